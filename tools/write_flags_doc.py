#!/usr/bin/env python
"""Write docs/flags.md from the flag table: python tools/write_flags_doc.py [OUTPUT]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.config.flags_doc import flags_markdown
from megalm.program import program


@program
def main(arguments: list[str]) -> int:
    """Write the page and return the exit code."""
    default = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("output", type=Path, nargs="?", default=default, help="file to write (docs/flags.md)")
    target: Path = parser.parse_args(arguments).output
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(flags_markdown(), encoding="utf-8")
    except OSError as error:
        parser.error(f"{target} cannot be written: {error.strerror}")
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

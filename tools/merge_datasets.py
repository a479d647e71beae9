#!/usr/bin/env python
"""Join corpora into one, in the order given: the bytes that tokenizing them together would have made."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.data.merge import merge_datasets
from megalm.errors import DataError, MegalmError


def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--input", nargs="+", required=True, help="corpus prefixes, or one folder: all corpora in it by name"
    )
    parser.add_argument("--output-prefix", required=True, help="prefix of the corpus to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus of that name")
    options = parser.parse_args(arguments)
    try:
        merged = merge_datasets(prefixes(options.input), options.output_prefix, overwrite=options.overwrite)
    except MegalmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.output_prefix}: {merged.num_documents:,} documents, {merged.num_tokens:,} tokens")
    return 0


def prefixes(inputs: list[str]) -> list[str]:
    """The prefixes given, or those of the corpora in a folder."""
    if len(inputs) == 1 and Path(inputs[0]).is_dir():
        found = [str(path.with_suffix("")) for path in sorted(Path(inputs[0]).glob("*.idx"))]
        if not found:
            raise DataError(f"folder {inputs[0]} holds no corpus")
        return found
    return inputs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

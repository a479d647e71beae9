#!/usr/bin/env python
"""Check corpora: the index against itself and the tokens, both files against their hashes, ids against the vocabulary.

Exit code: 0 if all are whole, 3 if not.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.data.indexed import sidecar_path
from megalm.data.meter import Meter
from megalm.data.verify import bytes_to_read, verify_corpus
from megalm.errors import DataError, MegalmError
from megalm.program import program


@program
def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("prefix", nargs="+", help="corpus prefixes: .bin paths without their suffix")
    parser.add_argument("--vocab-size", type=int, help="ids must be below this; default: the sidecar's vocabulary")
    options = parser.parse_args(arguments)
    if options.vocab_size is not None and options.vocab_size < 1:
        parser.error(f"--vocab-size {options.vocab_size} must be at least 1")
    code = 0
    for prefix in options.prefix:
        started = time.perf_counter()
        meter = Meter(prefix, bytes_to_read(prefix))
        try:
            found = verify_corpus(prefix, vocab_size=options.vocab_size, read=meter)
        except MegalmError as error:
            meter.close()
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            code = DataError.exit_code
            continue
        meter.close()
        hashes = (
            "both files have their sha256"
            if found.hashed
            else f"no {sidecar_path(prefix).name} beside it, so that a changed token cannot be told from a right one"
        )
        ids = f"ids 0 to {found.largest_id}" + ("" if found.vocab_size is None else f" of {found.vocab_size}")
        print(
            f"{prefix}: whole; {found.documents:,} documents, {found.tokens:,} tokens; {hashes}; {ids}; "
            f"{time.perf_counter() - started:.1f} s"
        )
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

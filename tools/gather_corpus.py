#!/usr/bin/env python
"""Write a jsonl corpus of the sources and documentation that are installed on this machine."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.data.corpus import installed_folders, write_corpus
from megalm.program import program


@program
def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="jsonl file to write")
    parser.add_argument(
        "--folder", type=Path, action="append", help="read this folder (repeatable); default: installed Python"
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed of the order of documents (default: 1234)")
    parser.add_argument(
        "--target-mb", type=float, default=24.0, help="stop after this much text, in 10^6 bytes (default: 24)"
    )
    parser.add_argument("--min-mb", type=float, default=20.0, help="fail with less text than this (default: 20)")
    options = parser.parse_args(arguments)

    for flag, megabytes in (("--target-mb", options.target_mb), ("--min-mb", options.min_mb)):
        if not 0 < megabytes < 1e9:
            parser.error(f"{flag} {megabytes} must be greater than 0, and a size that a disk holds")
    started = time.perf_counter()
    folders = options.folder or installed_folders()
    report = write_corpus(
        options.output,
        folders,
        seed=options.seed,
        target_bytes=int(options.target_mb * 1e6),
        required_bytes=int(options.min_mb * 1e6),
    )
    print(
        f"{options.output}: {report.num_documents:,} documents, {report.text_bytes / 1e6:.1f} MB of text from "
        f"{', '.join(map(str, folders))} ({report.num_duplicates:,} duplicates and {report.num_skipped:,} files "
        f"of unfit size left out) in {time.perf_counter() - started:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/env python
"""Build the sample maps of a run before it starts: the run's own command line goes after `--`.

python tools/build_index.py -- --config configs/debug/tiny.yaml --data-path corpus_text_document ...
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.program import program


@program
def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-parallel-size", type=int, default=1, help="only for runs without --global-batch-size (1)"
    )
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:cut])
    if options.data_parallel_size < 1:
        parser.error(f"--data-parallel-size {options.data_parallel_size} must be at least 1")
    started = time.perf_counter()
    from megalm.config.parse import parse_command_line
    from megalm.train.samples import datasets_of_run

    config = parse_command_line(arguments[cut + 1 :])
    datasets = datasets_of_run(config, dp_size=options.data_parallel_size, log=print)
    print("\n".join(datasets.report))
    for warning in datasets.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/env python
"""Write a checkpoint, megalm's or BigScience's, for other tensor-parallel and pipeline sizes."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.errors import MegalmError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    result.add_argument("--load", type=Path, required=True, help="folder that a run saved to, or one checkpoint in it")
    result.add_argument("--step", type=int, help="step of the checkpoint; default: the one that `latest` names")
    result.add_argument("--save", type=Path, required=True, help="folder that receives the reshaped checkpoint")
    result.add_argument("--tensor-model-parallel-size", type=int, required=True, help="shards of each layer")
    result.add_argument("--pipeline-model-parallel-size", type=int, default=1, help="pipeline stages (default: 1)")
    result.add_argument("--workers", type=int, default=4, help="layers converted at a time (default: 4)")
    return result


def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    options = parser().parse_args(arguments)
    started = time.perf_counter()
    try:
        from megalm.checkpoint.find import find_checkpoint
        from megalm.checkpoint.reshape import reshape_checkpoint

        checkpoint = find_checkpoint(options.load, step=options.step, warn=lambda text: print(text, file=sys.stderr))
        path = reshape_checkpoint(
            checkpoint,
            options.save,
            tp_size=options.tensor_model_parallel_size,
            pp_size=options.pipeline_model_parallel_size,
            num_threads=max(1, options.workers),
            progress=show_progress if sys.stderr.isatty() else None,
        )
    except MegalmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{checkpoint} -> {path}, {time.perf_counter() - started:.1f} s")
    return 0


def show_progress(what: str) -> None:
    """Redraw the progress line."""
    print(f"\rwritten: {what:<60.60}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

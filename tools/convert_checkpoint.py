#!/usr/bin/env python
"""Write a checkpoint anew: for other tensor-parallel and pipeline sizes, or in DeepSpeed's universal form.

Reads megalm's, BigScience's and universal checkpoints.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.errors import CheckpointError, ConfigError
from megalm.program import program


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--load", type=Path, required=True, help="folder that a run saved to, or one checkpoint in it")
    result.add_argument("--step", type=int, help="step of the checkpoint; default: the one that `latest` names")
    result.add_argument("--save", type=Path, required=True, help="folder that receives the converted checkpoint")
    result.add_argument("--tensor-model-parallel-size", type=int, help="shards of each layer (default: 1)")
    result.add_argument("--pipeline-model-parallel-size", type=int, help="pipeline stages (default: 1)")
    result.add_argument(
        "--to-universal", action="store_true", help="write DeepSpeed's universal form, which has no layout"
    )
    result.add_argument("--workers", type=int, default=4, help="layers converted at a time (default: 4)")
    return result


def run(options: argparse.Namespace) -> tuple[Path, Path]:
    """Find and convert; returns what was read and what was written."""
    from megalm.checkpoint.byte_line import ByteLine
    from megalm.checkpoint.find import find_checkpoint, named_by
    from megalm.checkpoint.layout import LATEST, LATEST_UNIVERSAL
    from megalm.checkpoint.reshape import reshape_checkpoint
    from megalm.checkpoint.universal_writer import write_universal

    sizes = (options.tensor_model_parallel_size, options.pipeline_model_parallel_size)
    if options.to_universal and sizes != (None, None):
        raise CheckpointError("--to-universal has no layout\n  leave out the parallel sizes")
    if not options.to_universal and sizes == (None, None):
        raise CheckpointError("convert into what?\n  give --tensor-model-parallel-size, or --to-universal")
    tp_size, pp_size = (1 if size is None else size for size in sizes)
    if options.workers < 1:
        raise ConfigError(f"--workers {options.workers} must be at least 1")
    verifying, writing = ByteLine(sys.stderr, "verifying"), ByteLine(sys.stderr, "writing")
    checkpoint = find_checkpoint(options.load, step=options.step, warn=warn, progress=verifying)
    verifying.close()

    def progress(what: str, count: int) -> None:
        writing(count, 0, what)

    if options.to_universal:
        path = write_universal(checkpoint, options.save, num_threads=options.workers, progress=progress)
    else:
        path = reshape_checkpoint(
            checkpoint,
            options.save,
            tp_size=tp_size,
            pp_size=pp_size,
            num_threads=options.workers,
            progress=progress,
        )
    writing.close()
    latest = path.parent / (LATEST_UNIVERSAL if options.to_universal else LATEST)
    if (named := named_by(latest)) != path:
        warn(f"{latest} still names the later {named.name}; what is made of {path.name} is loaded by --load {path}")
    return checkpoint, path


def warn(message: str) -> None:
    """Print a warning."""
    print(f"warning: {message}", file=sys.stderr)


@program
def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    options = parser().parse_args(arguments)
    started = time.perf_counter()
    checkpoint, path = run(options)
    print(f"{checkpoint} -> {path}, {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/env python
"""Check a checkpoint: every byte against its manifest, every tensor for NaN and infinity, shapes, replica drift.

Exit code: 0 if it is whole, 5 if not.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.errors import CheckpointError
from megalm.program import program


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--load", type=Path, required=True, help="folder that a run saved to, or one checkpoint in it")
    result.add_argument("--step", type=int, help="step of the checkpoint; default: every checkpoint of the folder")
    result.add_argument("--hashes-only", action="store_true", help="leave the tensors unread")
    return result


def run(options: argparse.Namespace) -> bool:
    """Inspect each checkpoint; returns whether all are whole."""
    from megalm.checkpoint.byte_line import ByteLine
    from megalm.checkpoint.inspection import inspect_checkpoint

    whole = True
    for folder in chosen_checkpoints(options.load, options.step):
        started = time.perf_counter()
        line = ByteLine(sys.stderr, folder.name)
        result = inspect_checkpoint(folder, hashes_only=options.hashes_only, progress=line)
        line.close()
        elapsed = time.perf_counter() - started
        whole = whole and not result.problems
        verdict = "whole" if not result.problems else f"{len(result.problems)} problems"
        print(
            f"{folder}: {verdict}; {result.num_files} files, {result.num_bytes / 1e6:.1f} MB, "
            f"{result.num_tensors} tensors, {elapsed:.1f} s"
        )
        for remark in [*result.problems, *result.remarks]:
            print(f"  {remark}")
    return whole


def chosen_checkpoints(folder: Path, step: int | None) -> list[Path]:
    """The checkpoints that the command line means.

    Raises: CheckpointError if there is none.
    """
    from megalm.checkpoint import layout
    from megalm.checkpoint.find import has_no_hashes, is_hugging_face
    from megalm.checkpoint.retention import published_checkpoints
    from megalm.checkpoint.universal import is_universal

    foreign = is_hugging_face(folder)
    if ((folder / layout.MANIFEST).exists() and not foreign) or has_no_hashes(folder):
        if step is not None and layout.parse_step(folder.resolve().name) != step:
            raise CheckpointError(f"{folder} is one checkpoint, and not that of step {step}\n  leave out --step")
        return [folder]
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    found = [path for number, path in published_checkpoints(folder) if step is None or number == step]
    if step is None:  # DeepSpeed's converter gives its folder any name
        found += [
            path
            for path in sorted(folder.iterdir())
            if path not in found and path.suffix != ".tmp" and is_universal(path)
        ]
    if not found and foreign:
        raise CheckpointError(
            f"{folder} is a Hugging Face folder\n  checkpoints are checked here; export_hf.py --verify checks an export"
        )
    if not found:
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise CheckpointError(f"{folder} holds no {wanted}")
    return found


@program
def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    options = parser().parse_args(arguments)
    return 0 if run(options) else CheckpointError.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

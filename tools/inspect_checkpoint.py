#!/usr/bin/env python
"""Show what a checkpoint is: step, layout, sizes, the norm of every tensor; or where two checkpoints differ.

With --diff the exit code is 0 if every tensor is bit-equal and 1 if not.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.program import program

if TYPE_CHECKING:
    from megalm.checkpoint.lineage import Tip

LEFT_OUT = "left_out"
"""Key of train_state.json."""
KINDS = {
    "weights": re.compile(r"layer_.*|fp32\.pt"),
    "optimizer": re.compile(r".*_optim_states\.pt|exp_avg(_sq)?\.pt|step\.pt|optimizer_state\.pt"),
    "engine state": re.compile(r".*model_states\.pt"),
    "random numbers": re.compile(r"rng_.*"),
    "descriptions": re.compile(r".*"),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--load", type=Path, required=True, help="folder that a run saved to, or one checkpoint in it")
    result.add_argument("--step", type=int, help="step of the checkpoint; default: the one that `latest` names")
    result.add_argument("--norms", action="store_true", help="list every tensor with its norm")
    result.add_argument("--diff", type=Path, help="another checkpoint, of any layout, to compare tensor by tensor")
    result.add_argument("--weights-only", action="store_true", help="leave out optimizer states")
    return result


def describe(checkpoint: Path) -> None:
    """Print step, layout, model, lineage and sizes."""
    from megalm.checkpoint.lineage import KEY as LINEAGE
    from megalm.checkpoint.lineage import Tip, lineage_in
    from megalm.checkpoint.roll_backs import KEY as ROLL_BACKS
    from megalm.checkpoint.roll_backs import SPIKE_WATCH
    from megalm.checkpoint.source import open_checkpoint
    from megalm.models.gpt.weights import weight_table

    source = open_checkpoint(checkpoint)
    manifest = source.manifest
    print(f"{checkpoint}: step {manifest.step}")
    print(f"  layout     {', '.join(f'{name} {value}' for name, value in manifest.layout.items())}")
    shape = source.shape
    print(
        f"  model      {shape.num_layers} layers, hidden {shape.hidden_size}, {shape.block.num_heads} heads, "
        f"{shape.vocab_rows} rows of vocabulary, {sum(weight.numel for weight in weight_table(shape)):,} parameters"
    )
    apart = (LINEAGE, ROLL_BACKS, SPIKE_WATCH, LEFT_OUT)
    progress = [f"{name} {value}" for name, value in source.train_state.items() if name not in apart]
    print(f"  progress   {', '.join(progress)}")
    for heading, line in left_out_lines(source.train_state):
        print(f"  {heading:<11}{line}")
    for heading, line in lineage_lines(checkpoint, Tip(manifest.step, lineage_in(source.train_state))):
        print(f"  {heading:<11}{line}")
    print(f"  versions   {', '.join(f'{name} {value}' for name, value in manifest.versions.items()) or 'unknown'}")
    sizes = dict.fromkeys(KINDS, 0)
    for path in checkpoint.rglob("*"):
        if path.is_dir():
            continue
        kind = next(kind for kind, pattern in KINDS.items() if pattern.fullmatch(path.name))
        sizes[kind] += path.stat().st_size
    print(f"  size       {', '.join(f'{kind} {size / 1e6:.2f} MB' for kind, size in sizes.items() if size)}")


def left_out_lines(train_state: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(heading, text): steps that the run passed over, and why it was taken back."""
    from megalm.checkpoint.roll_backs import KEY as ROLL_BACKS
    from megalm.checkpoint.roll_backs import parse_roll_backs

    for entry in train_state.get(LEFT_OUT) or ():
        steps, samples = (
            f"{entry['first_step']} to {entry['last_step']}",
            f"{entry['first_sample']} to {entry['last_sample']}",
        )
        yield "left out", f"steps {steps}, samples {samples}"
    for roll_back in parse_roll_backs(train_state.get(ROLL_BACKS)):
        yield "taken back", f"to leave out {roll_back}"


def lineage_lines(checkpoint: Path, tip: Tip) -> Iterator[tuple[str, str]]:
    """(heading, text): the attempts of a run that was taken back, and which steps beside this one are not its own."""
    from megalm.checkpoint.history import own_checkpoints
    from megalm.checkpoint.lineage import describe
    from megalm.checkpoint.retention import published_checkpoints

    if tip.lineage:
        yield "lineage", describe(tip.lineage)
    published = published_checkpoints(checkpoint.parent)
    if checkpoint not in [path for _, path in published]:
        return
    own = own_checkpoints(tip, published)
    others = [path.name for step, path in published if path not in own and step <= tip.step]
    if others:
        yield "not of it", f"{', '.join(others)}: earlier steps that its run had left behind, or never had"


def run(options: argparse.Namespace) -> int:
    """Describe, list, compare."""
    from megalm.checkpoint.byte_line import ByteLine
    from megalm.checkpoint.comparison import tensor_differences, tensor_reports
    from megalm.checkpoint.find import find_checkpoint

    line = ByteLine(sys.stderr, "verifying")
    checkpoint = find_checkpoint(options.load, step=options.step, warn=warn, progress=line)
    line.close()
    describe(checkpoint)
    with_optimizer = not options.weights_only
    if options.norms:
        for report in tensor_reports(checkpoint, optimizer=with_optimizer):
            print(f"  {report.norm:12.6g}  {report.dtype:<9}{list(report.shape)!s:<16}{report.name}")
    if options.diff is None:
        return 0
    other = find_checkpoint(options.diff, warn=warn, progress=line)
    line.close()
    describe(other)
    different = 0
    comparing = ByteLine(sys.stderr, "comparing")

    def progress(name: str, count: int) -> None:
        comparing(count, 0, name)

    for difference in tensor_differences(checkpoint, other, optimizer=with_optimizer, progress=progress):
        different += 1
        comparing.pause()
        print(
            f"  differs by up to {difference.largest:.3e} (relative norm {difference.relative:.3e})  {difference.name}"
        )
    comparing.close()
    print("every tensor is bit-equal" if different == 0 else f"{different} tensors differ")
    return 0 if different == 0 else 1


def warn(message: str) -> None:
    """Print a warning."""
    print(f"warning: {message}", file=sys.stderr)


@program
def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    options = parser().parse_args(arguments)
    return run(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/env python
"""Say what a run came to: losses against the unigram entropy of its validation, resumes, speed; draw its curve."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.errors import CheckpointError, ConfigError
from megalm.program import program

EXIT_MARGIN_MISSED = 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    result.add_argument("--load", type=Path, required=True, help="folder that the run saved to")
    result.add_argument("--metrics-path", type=Path, help="its metrics file; default: metrics.jsonl in that folder")
    result.add_argument("--picture", type=Path, help="PNG to draw the curve into")
    result.add_argument("--output", type=Path, help="JSON file to write the figures into")
    result.add_argument(
        "--require-margin", type=float, metavar="NATS", help="fail unless every validation loss is this far below"
    )
    return result


def run(options: argparse.Namespace) -> int:
    """Read, print, draw. Returns the exit code."""
    from megalm.checkpoint.find import find_checkpoint
    from megalm.checkpoint.identity import read_config
    from megalm.checkpoint.manifest import read_manifest
    from megalm.telemetry.plot import plot_curve
    from megalm.train.summary import summarise, validation_entropies

    checkpoint = find_checkpoint(options.load, warn=lambda text: print(text, file=sys.stderr))
    config = read_config(checkpoint)
    if config is None:
        raise CheckpointError(f"{checkpoint} holds no config.yaml, so its corpus is not known")
    entropies = validation_entropies(config, dp_size=read_manifest(checkpoint).layout["dp"])
    metrics_path = options.metrics_path or options.load / "metrics.jsonl"
    summary = summarise(metrics_path, entropies)

    print(f"steps                 {summary.steps:,}, {summary.tokens:,} tokens")
    print(f"time in steps         {summary.step_seconds:.0f} s, {summary.tokens_per_second:,.0f} tokens/s")
    print(f"waited for data       {summary.data_seconds:.2f} s, {summary.data_share:.2%} of the steps")
    for resume in summary.resumes:
        before, after = _loss(resume.loss_before), _loss(resume.loss_after)
        print(f"resumed at step       {resume.step}: training loss {before} in it, {after} on the next samples")
    print(f"last training loss    {summary.train_loss:.4f} nats per token")
    for name, valid in summary.validation.items():
        print(f"{name + ' loss':<22}{valid.loss:.4f} nats per token at step {valid.step}")
        print(f"unigram entropy       {valid.unigram_entropy:.4f} nats per token of the same tokens")
        print(f"margin                {valid.margin:.4f} nats per token below")
    if options.picture is not None:
        first = next(iter(summary.validation.values()))
        plot_curve(metrics_path, options.picture, unigram_entropy=first.unigram_entropy)
    margin = min(valid.margin for valid in summary.validation.values())
    if options.output is not None:
        write_figures(options.output, {**asdict(summary), "margin": margin})
    if options.require_margin is not None and not margin >= options.require_margin:
        print(f"the margin is {margin:.4f}, and {options.require_margin} was required", file=sys.stderr)
        return EXIT_MARGIN_MISSED
    return 0


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    """Write the figures as JSON."""
    try:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the figures {path} cannot be written: {error.strerror}\n  name a file in a writable folder"
        ) from error


@program
def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    return run(parser().parse_args(arguments))


def _loss(loss: float | None) -> str:
    return "not logged" if loss is None else f"{loss:.4f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/env python
"""What was the model reading at step 12,345? From steps or samples back to corpus, document, offset and text.

The run's own command line, or the config.yaml of one of its checkpoints, goes after `--`:

    python tools/trace_samples.py --steps 12345 -- --config runs/x/global_step13000/config.yaml
    python tools/trace_samples.py --samples 0:16 --no-text -- --config configs/debug/tiny.yaml --data-path ...

Steps are turned into samples by the batch sizes of that configuration, through ramp-up and steps that were left out. A
run whose batch size changed when it was resumed has its metrics file for that: --metrics-path.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.errors import ConfigError, DataError
from megalm.program import program

if TYPE_CHECKING:
    from megalm.checkpoint.roll_backs import RollBack
    from megalm.config.root import Config
    from megalm.tokenizers.protocol import Tokenizer


def parser() -> argparse.ArgumentParser:
    """The command line before `--`."""
    result = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = result.add_mutually_exclusive_group(required=True)
    which.add_argument("--steps", help="a training step, counted from 1, or FIRST:LAST, the last included")
    which.add_argument("--samples", help="a training sample, counted from 0, or FIRST:LAST, the last included")
    result.add_argument("--metrics-path", help="take the samples of --steps from this record of the run")
    result.add_argument("--no-text", action="store_true", help="show where tokens come from, but decode nothing")
    result.add_argument("--max-tokens", type=int, default=60, help="tokens shown of each piece (60)")
    result.add_argument("--json", action="store_true", help="a JSON object a piece, with its token ids")
    result.add_argument(
        "--data-parallel-size", type=int, default=1, help="only for runs without --global-batch-size (1)"
    )
    return result


def run(options: argparse.Namespace, command_line: list[str]) -> None:
    """Print every piece of every sample asked for."""
    from dataclasses import asdict
    from functools import partial

    from megalm.config.parse import parse_command_line
    from megalm.data.trace import trace
    from megalm.train.samples import datasets_of_run, sample_counts

    if options.data_parallel_size < 1:
        raise ConfigError(f"--data-parallel-size {options.data_parallel_size} must be at least 1")
    if options.max_tokens < 0:
        raise ConfigError(f"--max-tokens {options.max_tokens} must not be negative")
    config = parse_command_line(command_line)
    tokenizer = None if options.no_text else tokenizer_of(config)
    say = partial(print, file=sys.stderr)
    source = datasets_of_run(config, dp_size=options.data_parallel_size, verifies=False, log=say).train
    if source is None:
        raise DataError("this run has no training samples")
    read = sample_counts(config, dp_size=options.data_parallel_size)["train"]
    for step, number in chosen(options, config):
        if not 0 <= number < read:
            raise DataError(f"sample {number} does not exist; the run has 0 to {read - 1}")
        tokens = source[number]
        if not options.json:
            print(f"sample {number}" + ("" if step is None else f" of step {step}"))
        for piece in trace(source, number):
            shown = tokens[piece.position : piece.position + min(piece.length, options.max_tokens)].tolist()
            text = None if tokenizer is None else tokenizer.decode(shown)
            if options.json:
                found = {"step": step, "sample": number, **asdict(piece), "ids": shown, "text": text}
                print(json.dumps(found, ensure_ascii=False))
                continue
            print(
                f"  tokens {piece.position} to {piece.position + piece.length - 1}: {piece.prefix} "
                f"document {piece.document}, from token {piece.offset}"
            )
            if text is not None:
                print("    " + text.replace("\n", "\n    "))


def tokenizer_of(config: Config) -> Tokenizer:
    """The run's tokenizer.

    Raises: DataError if it is known that another one made the corpora: the text would be another one too.
    """
    from megalm.checkpoint.run_tokenizer import tokenizer_facts
    from megalm.data.build import corpus_prefixes
    from megalm.data.same_tokenizer import check_made_with
    from megalm.tokenizers.build import build_tokenizer

    tokenizer = build_tokenizer(config.data, vocab_size=config.model.vocab_size)
    facts = tokenizer_facts(tokenizer)
    for warning in filter(None, (check_made_with(prefix, facts) for prefix in corpus_prefixes(config.data))):
        print(f"warning: {warning}", file=sys.stderr)
    return tokenizer


def chosen(options: argparse.Namespace, config: Config) -> Iterator[tuple[int | None, int]]:
    """(step or None, sample) of everything asked for."""
    from megalm.train.samples import sample_counts, samples_of_steps, total_steps

    if options.samples is not None:
        first, last = bounds(options.samples, "--samples", least=0)
        read = sample_counts(config, dp_size=options.data_parallel_size)["train"]
        if last >= read:
            raise DataError(f"--samples {options.samples}: sample {last} does not exist; the run reads 0 to {read - 1}")
        for number in range(first, last + 1):
            yield None, number
        return
    first, last = bounds(options.steps, "--steps", least=1)
    total = total_steps(config, dp_size=options.data_parallel_size)
    if options.metrics_path is None and last > total:
        raise DataError(f"--steps {options.steps} goes past the last step of this run, {total}")
    steps = (
        samples_of_steps(config, first, last, dp_size=options.data_parallel_size, roll_backs=taken_back(config))
        if options.metrics_path is None
        else recorded_samples(options.metrics_path, first, last)
    )
    for step, numbers in steps:
        if not numbers:
            print(f"step {step} read no samples: it was left out, or is not recorded", file=sys.stderr)
        for number in numbers:
            yield step, number


def taken_back(config: Config) -> tuple[RollBack, ...]:
    """What the run left out since its loss rose, as the folder says that it saved to."""
    from megalm.checkpoint.taking_back import read_roll_backs

    return () if config.output.save is None else read_roll_backs(Path(config.output.save))


def recorded_samples(path: str, first: int, last: int) -> Iterator[tuple[int, range]]:
    """(step, its sample numbers) as the run wrote them down; a step without a record was left out, or is to come."""
    from megalm.telemetry.metric_log import read_metric_log

    records = {
        record["step"]: range(record["consumed_samples"] - record["global_batch_size"], record["consumed_samples"])
        for record in read_metric_log(path)
        if record["kind"] == "train" and first <= record["step"] <= last
    }
    if not records:
        raise DataError(f"{path} records no step of {first} to {last}")
    for step in range(first, last + 1):
        yield step, records.get(step, range(0))


def bounds(text: str, flag: str, *, least: int) -> tuple[int, int]:
    """`7` or `7:9` as two numbers."""
    parts = text.split(":")
    try:
        first, last = int(parts[0]), int(parts[-1])
    except ValueError as error:
        raise DataError(f"{flag} {text} is neither a number nor FIRST:LAST") from error
    if len(parts) > 2 or not least <= first <= last:
        raise DataError(f"{flag} {text} must fit {least} <= FIRST <= LAST")
    return first, last


@program
def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser().parse_args(arguments[:cut])
    run(options, arguments[cut + 1 :])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

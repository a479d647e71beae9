"""Flags that other trainers' tokenization tools have and this one obeys without doing anything, or refuses."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megalm.config.data import OTHER_TOKENIZER_NAMES, REFUSED_TOKENIZERS, TOKENIZERS
from megalm.errors import ConfigError

TOKENIZER_TYPES = {
    **{name.lower(): name for name in TOKENIZERS},
    **{name.lower(): kind for name, kind in OTHER_TOKENIZER_NAMES.items()},
}


@dataclass(frozen=True)
class ForeignFlag:
    """A flag of another tool."""

    name: str
    reason: str
    """Why it changes nothing; for one that is refused, what to do instead."""
    takes: str = ""
    """What follows it: nothing, `value` or `values`."""
    refused: bool = False


FOREIGN_FLAGS = (
    ForeignFlag("--keep-sequential-samples", "documents are always in the order of the input"),
    ForeignFlag("--legacy-tokenizer", "there is one tokenizer system"),
    ForeignFlag("--trust-remote-code", "no code of a tokenizer's folder is ever run; its tokenizer.json is read"),
    ForeignFlag("--chunk-size", "tasks are sized in bytes of text, by --block-bytes", "value"),
    ForeignFlag("--workers-to-check", "it is a setting of --find-optimal-num-workers", "values"),
    ForeignFlag("--max-documents", "it is a setting of --find-optimal-num-workers", "value"),
    ForeignFlag("--performance-dir", "it is a setting of --find-optimal-num-workers", "value"),
    ForeignFlag(
        "--find-optimal-num-workers",
        "pass --workers with the number of cores: throughput grows with every worker, see docs/data.md",
        refused=True,
    ),
    ForeignFlag(
        "--tokenizer-metadata",
        "say the kind of tokenizer with --tokenizer-type, and where its files are with --tokenizer-model",
        "value",
        refused=True,
    ),
    ForeignFlag("--append-bos", "leave it out: documents begin with their text", refused=True),
    ForeignFlag("--prepend-space", "leave it out, or put the space into the text", refused=True),
    ForeignFlag("--datasets", "tools/merge_datasets.py joins corpora", "values", refused=True),
    *(
        ForeignFlag(name, "add them to the tokenizer's files", "values", refused=True)
        for name in ("--special-tokens", "--tokenizer-special-tokens")
    ),
    ForeignFlag("--tokenizer-hf-no-use-fast", "leave it out: tokenizer.json is what is read", refused=True),
    ForeignFlag(
        "--tokenizer-hf-no-include-special-tokens",
        "leave it out, and take the template that adds tokens, if there is one, out of tokenizer.json",
        refused=True,
    ),
    ForeignFlag("--tokenizer-sentencepiece-legacy", "leave it out: models are read as they are", refused=True),
    ForeignFlag("--sft-tokenizer-prompt-format", "apply the template to the text before", "value", refused=True),
    *(
        ForeignFlag(name, REFUSED_TOKENIZERS["tiktokenizer"], takes, refused=True)
        for name, takes in (
            ("--tiktoken-pattern", "value"),
            ("--tiktoken-num-special-tokens", "value"),
            ("--tiktoken-special-tokens", "values"),
        )
    ),
)


def add_foreign_flags(parser: argparse.ArgumentParser) -> None:
    """Let the parser accept them."""
    group = parser.add_argument_group("flags of other tools, which change nothing or are refused")
    for flag in FOREIGN_FLAGS:
        options: dict[str, Any] = {"action": "store_true"}
        if flag.takes:
            options = {"nargs": "+" if flag.takes == "values" else None, "metavar": "X"}
        effect = "refused: " if flag.refused else "no effect: "
        group.add_argument(flag.name, help=effect + flag.reason, **options)
    group.add_argument("--vocab-extra-ids", type=int, default=0, help="refused unless 0: sentinels of T5 are not made")


def notices(options: argparse.Namespace) -> Iterator[str]:
    """A line for each flag that was given and changes nothing.

    Raises: ConfigError for a flag or value that cannot be obeyed.
    """
    for flag in FOREIGN_FLAGS:
        if not getattr(options, flag.name[2:].replace("-", "_")):
            continue
        if flag.refused:
            raise ConfigError(f"{flag.name} cannot be obeyed\n  {flag.reason}")
        yield f"{flag.name} changes nothing: {flag.reason}"
    if options.vocab_extra_ids:
        raise ConfigError(
            f"--vocab-extra-ids {options.vocab_extra_ids}: sentinel tokens of T5 are not made here\n"
            "  add them to the tokenizer's files"
        )
    if options.dataset_impl != "mmap":
        raise ConfigError(
            f"--dataset-impl {options.dataset_impl}: the mmap format is the one that is written\n"
            "  pass mmap, which Megatron and BigScience read too"
        )
    if options.partitions > 1 and options.partition is None:
        yield (
            f"--partitions {options.partitions} without --partition: all of them here, which gives the bytes of one "
            "run; --workers spreads the work"
        )


def tokenizer_type(name: str) -> str:
    """Our name of a tokenizer type.

    Raises: ConfigError for types of other tools that are not read.
    """
    remedy = REFUSED_TOKENIZERS.get(name.lower())
    if remedy is not None:
        raise ConfigError(f"--tokenizer-type {name} is not read\n  {remedy}")
    return TOKENIZER_TYPES.get(name.lower(), name)


def stored_vocab_size(options: argparse.Namespace, size: int) -> int:
    """The vocabulary that the width of stored ids is chosen for: padded if that is asked for, as in BigScience's tool.

    Raises: ConfigError for a padded size that does not hold the tokenizer's ids.
    """
    for flag in ("pad_vocab_size_to", "padded_vocab_size"):
        padded = getattr(options, flag)
        if padded is not None and padded < size:
            name = flag.replace("_", "-")
            raise ConfigError(f"--{name} {padded} is less than the tokenizer's {size} ids\n  pass {size} or more")
        if padded is not None:
            return int(padded)
    divisor = options.make_vocab_size_divisible_by
    if divisor is None:
        return size
    if divisor < 1:
        raise ConfigError(f"--make-vocab-size-divisible-by {divisor} must be 1 or more")
    return int(-(-size // divisor) * divisor)

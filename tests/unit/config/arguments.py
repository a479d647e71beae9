"""The smallest command line that passes every check, for tests that change one thing about it."""

from __future__ import annotations

from megalm.config.parse import parse_command_line
from megalm.config.root import Config

SMALLEST = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --lr 1e-3 "
    "--train-iters 10 --data-path corpus --tokenizer-name-or-path tokenizer"
).split()


def smallest(*more: str, without: tuple[str, ...] = ()) -> Config:
    """The Config of the smallest command line, less some flags with their value, and with more words."""
    words = list(SMALLEST)
    for name in without:
        position = words.index(name)
        del words[position : position + 2]
    return parse_command_line([*words, *more])

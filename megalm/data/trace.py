"""From the number of a training sample back to the documents that it was cut from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megalm.data.blend import Blend
from megalm.data.gpt_dataset import GPTDataset
from megalm.data.source import SampleSource


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one document within a sample."""

    prefix: str
    document: int
    sequence: int
    offset: int
    """First token, counted in the sequence."""
    length: int
    position: int
    """Where it starts in the sample."""


def trace(source: SampleSource, number: int) -> list[Piece]:
    """What sample `number` of a source is made of, in order, through any blend."""
    if isinstance(source, Blend):
        return trace(source.datasets[int(source.choices[number])], int(source.numbers[number]))
    if not isinstance(source, GPTDataset):
        raise TypeError(f"samples of a {type(source).__name__} cannot be traced")
    pieces = []
    position = 0
    for sequence, offset, length in source.pieces(number):
        document = int(np.searchsorted(source.indexed.document_index, sequence, side="right")) - 1
        pieces.append(Piece(source.indexed.prefix, document, sequence, offset, length, position))
        position += length
    return pieces

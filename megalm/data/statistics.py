"""What a corpus is made of: counts, document lengths, a histogram that a terminal can show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.indexed import IndexedDataset

BARS = " ▏▎▍▌▋▊▉█"
WIDTH = 50
RUN = 1 << 22
"""Tokens looked at together."""


@dataclass(frozen=True)
class Statistics:
    """Counts of a corpus and the distribution of its document lengths, in tokens."""

    documents: int
    sequences: int
    tokens: int
    shortest: int
    median: float
    mean: float
    longest: int
    largest_id: int | None
    """None unless the tokens were read."""


def document_lengths(indexed: IndexedDataset) -> npt.NDArray[np.int64]:
    """Tokens of each document."""
    ends = np.zeros(indexed.num_sequences + 1, np.int64)
    np.cumsum(indexed.lengths, out=ends[1:])
    lengths: npt.NDArray[np.int64] = np.diff(ends[indexed.document_index])
    return lengths


def largest_id(indexed: IndexedDataset, *, read: Callable[[int], None] | None = None) -> int | None:
    """The largest id of the corpus, None if it is empty; `read` hears of bytes as they are read."""
    largest = None
    for start in range(0, indexed.num_tokens, RUN):
        part = indexed.tokens[start : start + RUN]
        largest = max(int(part.max()), -1 if largest is None else largest)
        if read is not None:
            read(part.nbytes)
    return largest


def statistics(
    indexed: IndexedDataset, *, read_tokens: bool = False, read: Callable[[int], None] | None = None
) -> Statistics:
    """Count; `read_tokens` reads the whole corpus to find its largest id, and `read` hears of it."""
    lengths = document_lengths(indexed)
    return Statistics(
        documents=indexed.num_documents,
        sequences=indexed.num_sequences,
        tokens=indexed.num_tokens,
        shortest=int(lengths.min()) if len(lengths) else 0,
        median=float(np.median(lengths)) if len(lengths) else 0.0,
        mean=float(lengths.mean()) if len(lengths) else 0.0,
        longest=int(lengths.max()) if len(lengths) else 0,
        largest_id=largest_id(indexed, read=read) if read_tokens else None,
    )


def histogram(lengths: npt.NDArray[Any]) -> list[str]:
    """Lines of a picture: documents by length, in classes that double."""
    if not len(lengths):
        return ["no documents"]
    classes = np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    counts = np.bincount(classes)
    first = int(np.flatnonzero(counts)[0])
    lines = [f"{'tokens':>17}  documents"]
    for number in range(first, len(counts)):
        begin, end = (0 if number == 0 else 1 << number), (1 << (number + 1)) - 1
        lines.append(f"{begin:>8,}-{end:<8,}  {counts[number]:>9,} {_bar(counts[number] / counts.max())}")
    return lines


def _bar(share: float) -> str:
    eighths = round(share * WIDTH * 8)
    return "█" * (eighths // 8) + BARS[eighths % 8].strip()

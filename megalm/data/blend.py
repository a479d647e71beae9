"""Several corpora dealt in proportion to their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.source import SampleSource
from megalm.errors import DataError

MOST_CORPORA = np.iinfo(np.int16).max
CHUNKS = 1024
"""Stretches of the order that are computed side by side."""
CELLS = 1 << 16
"""Stretches times corpora at most, so that a step stays within the processor's cache."""
NUMBERING_RUN = 1 << 18


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights that add up to 1, by the two divisions of the other trainers, so that ties fall as they do there."""
    total = 0.0
    for weight in weights:
        total += weight
    once = np.array([weight / total for weight in weights], np.float64)
    result: list[float] = (once / np.sum(once)).tolist()
    return result


def largest_deficit(weights: Sequence[float], num_samples: int) -> npt.NDArray[np.int16]:
    """Which corpus gives each sample: the one that is furthest behind its share, the first of equals.

    The order is sequential by nature, each choice depending on all before. It is computed exactly and yet side by side:
    the order is cut in stretches, each starts from a guess of how much every corpus has given by then, and all are
    stepped together. A stretch that did not start from what the one before ended with is computed again from there.
    Greedy orders forget their start quickly, so that two or three rounds suffice; the result is exact at any rate.
    """
    shares = np.asarray(weights, np.float64)
    if num_samples == 0 or len(shares) == 1:
        return np.zeros(num_samples, np.int16)
    chunks = max(1, min(CHUNKS, CELLS // len(shares), num_samples // 64))
    length = -(-num_samples // chunks)
    starts = np.minimum(np.arange(chunks, dtype=np.int64) * length, num_samples)
    begin = np.stack([_guess(shares, int(start)) for start in starts])
    end = np.zeros_like(begin)
    choices = np.zeros((chunks, length), np.int16)
    stale = np.arange(chunks)
    while len(stale):
        choices[stale], end[stale] = _advance(shares, starts[stale], begin[stale], length)
        stale = 1 + np.flatnonzero((begin[1:] != end[:-1]).any(axis=1))
        begin[stale] = end[stale - 1]
    return choices.reshape(-1)[:num_samples]


def _guess(shares: npt.NDArray[np.float64], start: int) -> npt.NDArray[np.float64]:
    """Whole numbers near shares * start that add up to start."""
    exact = shares * start
    counts = np.floor(exact)
    missing = start - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[: max(0, missing)]] += 1
    return counts


def _advance(
    shares: npt.NDArray[np.float64], starts: npt.NDArray[np.int64], counts: npt.NDArray[np.float64], length: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float64]]:
    """Choices of `length` steps from each start, and the counts after them."""
    counts = counts.copy()
    rows = np.arange(len(starts))
    choices = np.empty((length, len(starts)), np.int16)
    deficits = np.empty_like(counts)
    for step in range(length):
        # The other trainers count the very first sample as the second, hence the maximum.
        np.multiply(shares, np.maximum(starts + step, 1)[:, None].astype(np.float64), out=deficits)
        deficits -= counts
        chosen = deficits.argmax(axis=1)
        choices[step] = chosen
        counts[rows, chosen] += 1
    return choices.T, counts


def numbered_within(choices: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """How often each entry's corpus was chosen before it: the sample that it gives.

    In runs that stay in the processor's cache: sorted by corpus, entries are counted on from the run before.
    """
    numbers = np.empty(len(choices), np.int32 if len(choices) <= np.iinfo(np.int32).max else np.int64)
    given = np.zeros(int(choices.max(initial=-1)) + 1, np.int64)
    for at in range(0, len(choices), NUMBERING_RUN):
        part = choices[at : at + NUMBERING_RUN]
        by_corpus = np.argsort(part, kind="stable")
        counts = np.bincount(part, minlength=len(given))
        offsets = given + counts - counts.cumsum()
        numbers[at + by_corpus] = np.arange(len(part)) + np.repeat(offsets, counts)
        given += counts
    return numbers


def samples_of_each(choices: npt.NDArray[Any], num_corpora: int) -> list[int]:
    """How many samples each corpus gives. numpy counts in a copy of 8 bytes a sample, which every rank of a host would
    make of an order of gigabytes that they share: so run after run."""
    counts = np.zeros(num_corpora, np.int64)
    for at in range(0, len(choices), NUMBERING_RUN):
        counts += np.bincount(choices[at : at + NUMBERING_RUN], minlength=num_corpora)
    found: list[int] = counts.tolist()
    return found


@dataclass(frozen=True)
class Dealing:
    """Which corpus gives each sample of a blend, and which of its samples."""

    choices: npt.NDArray[Any]
    numbers: npt.NDArray[Any]


def deal(weights: Sequence[float], num_samples: int) -> Dealing:
    """The dealing by largest deficit, for weights that add up to 1.

    Raises: DataError for more corpora than the order can number.
    """
    if len(weights) > MOST_CORPORA:
        raise DataError(f"{len(weights):,} corpora in one blend; {MOST_CORPORA:,} are the most, merge some")
    choices = largest_deficit(weights, num_samples)
    return Dealing(choices, numbered_within(choices))


class Blend:
    """A source whose samples come from several others in largest-deficit order."""

    def __init__(
        self,
        datasets: Sequence[SampleSource],
        weights: Sequence[float],
        num_samples: int,
        *,
        dealing: Dealing | None = None,
    ) -> None:
        """`dealing` is `deal` of the normalised weights, if the caller has it already."""
        if len(datasets) != len(weights) or not datasets:
            raise ValueError(f"{len(datasets)} datasets and {len(weights)} weights")
        self.datasets = tuple(datasets)
        self.weights = normalised(weights)
        dealing = dealing or deal(self.weights, num_samples)
        self.choices, self.numbers = dealing.choices, dealing.numbers

    def __len__(self) -> int:
        return len(self.choices)

    def __getitem__(self, i: int) -> npt.NDArray[Any]:
        return self.datasets[int(self.choices[i])][int(self.numbers[i])]

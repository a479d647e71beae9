"""Ranges of steps as `--skip-train-iteration-range` writes them: `1000-1100 2000-2010`, both ends included."""

from __future__ import annotations

import re
from collections.abc import Sequence

RANGE = re.compile(r"([0-9_]+)-([0-9_]+)")


def parse_step_ranges(words: Sequence[str]) -> tuple[range, ...]:
    """The steps of each range, counted from 1.

    Raises: ValueError naming the word that is no range of steps, or the two that overlap.
    """
    ranges = []
    for word in words:
        match = RANGE.fullmatch(word)
        if match is None:
            raise ValueError(f"{word!r} is not FIRST-LAST")
        first, last = (int(number) for number in match.groups())
        if not 1 <= first <= last:
            raise ValueError(f"{word!r} must run from a step, 1 or more, to one that is not before it")
        ranges.append(range(first, last + 1))
    ordered = sorted(ranges, key=lambda steps: steps.start)
    for before, after in zip(ordered, ordered[1:], strict=False):
        if after.start < before.stop:
            raise ValueError(f"{before.start}-{before.stop - 1} and {after.start}-{after.stop - 1} overlap")
    return tuple(ordered)

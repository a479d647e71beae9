"""numpy's legacy shuffle, faster on long arrays.

`RandomState.shuffle` walks i from n - 1 down to 1, draws j in [0, i] and swaps x[i] with x[j]; each swap waits for two
cache misses. Here the j are computed many at a time from the same raw numbers, and the swaps of a block of i are done
together, which is the same as long as no swap touches what another of the block touches. The result and the state of
the generator afterwards are those of `RandomState.shuffle`, whose stream numpy has promised never to change.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Any

import numpy as np
import numpy.typing as npt

TAIL = 1 << 18
"""Below this many elements everything lies in the cache, and numpy's own loop is as fast."""

AMBIGUOUS_BITS = 8
"""Raw numbers are judged in runs of i / 2^8: one in 2^8 of them then needs to be looked at by itself."""


def shuffle(random: np.random.RandomState, array: npt.NDArray[Any]) -> None:
    """Shuffle a one-dimensional array in place, exactly as `random.shuffle(array)` does."""
    top = len(array) - 1
    if top < 2 * TAIL or top >= 1 << 32:
        random.shuffle(array)
        return
    for partners in _partners(random, top, TAIL):
        at = 0
        while at < len(partners):
            block = partners[at : at + isqrt(top) // 3]
            done = _swap(array, top, block)
            at += done
            top -= done
    random.shuffle(array[: top + 1])


def _swap(array: npt.NDArray[Any], top: int, partners: npt.NDArray[np.uint32]) -> int:
    """Swap array[top - t] with array[partners[t]] for as many t as do not touch one another; returns how many."""
    count = len(partners)
    ordered = np.sort(partners)
    if int(ordered[-1]) > top - count or bool((ordered[1:] == ordered[:-1]).any()):
        count = _independent(top, partners.astype(np.int64))
    # numpy indexes by this type without a cast of its own for reading and for writing.
    index = partners[:count].astype(np.intp)
    moved = array.take(index)
    block = array[top - count + 1 : top + 1][::-1]
    array[index] = block
    block[...] = moved
    return count


def _independent(top: int, partners: npt.NDArray[np.int64]) -> int:
    """How many swaps come before the first one that touches an element of an earlier one."""
    count = len(partners)
    steps = top - partners
    # The partner is itself an i of this block: the swap at which it is one must wait. Swapping with itself is harmless.
    inside = (steps < count) & (steps != np.arange(count))
    if inside.any():
        count = int(steps[inside].min())
    by_partner = np.argsort(partners, kind="stable")
    ordered = partners[by_partner]
    again = by_partner[1:][ordered[1:] == ordered[:-1]]
    return min(count, int(again.min())) if len(again) else count


def _partners(random: np.random.RandomState, top: int, tail: int) -> Iterator[npt.NDArray[np.uint32]]:
    """The j of i = top down to `tail`, in runs; leaves the generator where numpy's loop would have it.

    A raw number, cut to the bits of i, is j if it is at most i, else the next one is tried.
    """
    while top >= tail:
        bits = top.bit_length()
        low = max(tail, 1 << (bits - 1))
        size = 1 << (bits - AMBIGUOUS_BITS)
        state = random.get_state()
        raw = random.randint(0, 1 << 32, size=size, dtype=np.uint32)
        raw &= np.uint32((1 << bits) - 1)
        taken = _accepted(raw, top)
        wanted = top - low + 1
        if len(taken) >= wanted:
            # i loses a bit or the tail begins in the middle of the run: give the numbers after that back.
            taken = taken[:wanted]
            random.set_state(state)
            random.randint(0, 1 << 32, size=int(taken[-1]) + 1, dtype=np.uint32)
        if len(taken):
            yield raw[taken]
            top -= len(taken)


def _accepted(raw: npt.NDArray[np.uint32], top: int) -> npt.NDArray[np.intp]:
    """Positions of the numbers that become partners, when each accepted one lowers the bound by one."""
    surely = raw <= np.uint32(max(0, top - len(raw)))
    perhaps = np.flatnonzero(~surely & (raw <= np.uint32(top)))
    if not len(perhaps):
        return np.flatnonzero(surely)
    before = np.cumsum(surely, dtype=np.int32)[perhaps].tolist()
    extra = 0
    for position, value, sure in zip(perhaps.tolist(), raw[perhaps].tolist(), before, strict=True):
        if value <= top - sure - extra:
            surely[position] = True
            extra += 1
    return np.flatnonzero(surely)

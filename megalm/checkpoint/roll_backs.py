"""Steps that a run leaves out because its loss rose in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass

KEY = "roll_backs"
"""Key of train_state.json."""
SPIKE_WATCH = "spike_watch"
"""Key of train_state.json with the losses that the next ones are compared with."""


@dataclass(frozen=True)
class RollBack:
    """One time that a run was taken back. Steps are counted from 1."""

    first: int
    last: int
    """Of the steps that are left out."""
    spike: int
    """The step at which the loss rose."""

    def __str__(self) -> str:
        return f"steps {self.first} to {self.last}, as the loss rose at step {self.spike}"


def parse_roll_backs(stored: object) -> tuple[RollBack, ...]:
    """Read what JSON made of them; nothing is none.

    Raises: ValueError.
    """
    if stored is None:
        return ()
    if not isinstance(stored, list | tuple):
        raise ValueError(f"roll-backs are {stored!r}")
    found = []
    for entry in stored:
        names = ("first", "last", "spike")
        if not isinstance(entry, dict) or [type(entry.get(name)) for name in names] != [int] * 3:
            raise ValueError(f"roll-backs have {entry!r}")
        roll_back = RollBack(*(entry[name] for name in names))
        if not 1 <= roll_back.first <= roll_back.spike <= roll_back.last:
            raise ValueError(f"roll-backs have {entry!r}")
        found.append(roll_back)
    return tuple(found)


def to_json(roll_backs: Sequence[RollBack]) -> list[dict[str, int]]:
    """Plain values, in the order in which the run was taken back."""
    return [asdict(roll_back) for roll_back in roll_backs]


def in_a_row(roll_backs: Sequence[RollBack], spike: int, *, within: int) -> int:
    """How many of them a spike follows, each no more than `within` steps after the steps that the one before left
    out."""
    count = 0
    for earlier in sorted(roll_backs, key=astuple, reverse=True):
        if earlier.last < spike <= earlier.last + within:
            count, spike = count + 1, earlier.spike
    return count

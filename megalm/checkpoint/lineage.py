"""Which attempt of a run a checkpoint is of.

A run that goes on from a step that is not its newest leaves later ones behind in its folder. They stay there, and are
not its own when it has passed them: the step after the one that it went on from begins another attempt.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KEY = "lineage"
"""Key of train_state.json and manifest.json."""
FIRST_ATTEMPT = ""
"""Of a run that was never taken back, and of what was written before there were lineages."""

Lineage = tuple[tuple[str, int], ...]
"""(attempt, its first step), oldest first; steps before all of them are of the first attempt."""


def lineage_in(state: Mapping[str, Any]) -> Lineage | None:
    """What train_state.json says; None if it is from before there were lineages, or says nothing that is one."""
    try:
        return parse_lineage(state.get(KEY))
    except ValueError:
        return None


def parse_lineage(stored: object) -> Lineage | None:
    """Read what JSON made of a lineage, or None.

    Raises: ValueError.
    """
    if stored is None:
        return None
    if not isinstance(stored, list | tuple):
        raise ValueError(f"lineage is {stored!r}")
    found: list[tuple[str, int]] = []
    for entry in stored:
        if not isinstance(entry, list | tuple) or [type(part) for part in entry] != [str, int]:
            raise ValueError(f"lineage has {entry!r}")
        attempt, first = entry
        if first < 0 or (found and first <= found[-1][1]):
            raise ValueError(f"lineage has attempt {attempt!r} from step {first}")
        found.append((attempt, first))
    return tuple(found)


def new_attempt() -> str:
    """A name that sorts by the time at which the attempt began."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def attempt_at(lineage: Lineage | None, step: int) -> str:
    """The attempt that made a step."""
    made_by = FIRST_ATTEMPT
    for attempt, first in lineage or ():
        if first <= step:
            made_by = attempt
    return made_by


@dataclass(frozen=True)
class Tip:
    """The newest checkpoint of a run."""

    step: int
    lineage: Lineage | None
    """None of one from before there were lineages: everything up to its step counts as the run's."""

    def has_behind(self, step: int, lineage: Lineage | None) -> bool:
        """Whether a checkpoint is one that the run came by."""
        if step > self.step:
            return False
        return self.lineage is None or attempt_at(self.lineage, step) == attempt_at(lineage, step)


def describe(lineage: Lineage) -> str:
    """In words."""
    return ", ".join(["the first attempt", *(f"attempt {attempt} from step {first} on" for attempt, first in lineage)])

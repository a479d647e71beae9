"""What moves while a run trains. Options live in `Config`; this is everything else that a resumed run needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from megalm.errors import CheckpointError

DAMAGED = "\n  the file is damaged or from another program; load an earlier checkpoint"


class LeftOut(NamedTuple):
    """Steps, counted from 1, and samples, counted from 0, that were neither read nor trained on; both ends included."""

    first_step: int
    last_step: int
    first_sample: int
    last_sample: int


@dataclass
class TrainState:
    """Progress of a run: counted in updates, in samples and in tokens, whatever the layout."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    """Updates that were not applied because a gradient was not finite."""
    left_out: tuple[LeftOut, ...] = ()
    """Steps that were passed over with their samples."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for `train_state.json`."""
        return {**asdict(self), "left_out": [left_out._asdict() for left_out in self.left_out]}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> TrainState:
        """Read what `to_json` wrote.

        Raises: CheckpointError if a count is missing, negative or no whole number.
        """
        counts = {field.name: _count(stored, field.name) for field in fields(cls) if field.name != "left_out"}
        entries = stored.get("left_out", [])  # There is none in checkpoints from before it was kept.
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise CheckpointError(
                f"train_state.json: left_out = {entries!r} must be a list of steps and samples{DAMAGED}"
            )
        left_out = tuple(LeftOut(*(_count(entry, name) for name in LeftOut._fields)) for entry in entries)
        return cls(**counts, left_out=left_out)


def _count(stored: dict[str, Any], name: str) -> int:
    value = stored.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"train_state.json: {name} = {value!r} must be a whole number, 0 or more{DAMAGED}")
    return value

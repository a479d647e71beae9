"""What moves while a run trains. Options live in `Config`; this is everything else that a resumed run needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from megalm.errors import CheckpointError


@dataclass
class TrainState:
    """Progress of a run: counted in updates, in samples and in tokens, whatever the layout."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    """Updates that were not applied because a gradient was not finite."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for `train_state.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> TrainState:
        """Read what `to_json` wrote.

        Raises: CheckpointError if a count is missing, negative or no whole number.
        """
        values = {}
        for field in fields(cls):
            value = stored.get(field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise CheckpointError(
                    f"train_state.json: {field.name} = {value!r} must be a whole number, 0 or more\n"
                    "  the file is damaged or from another program; load an earlier checkpoint"
                )
            values[field.name] = value
        return cls(**values)

"""Progress survives the trip through JSON, and nothing else passes for it."""

from __future__ import annotations

import json

import pytest

from megalm.errors import CheckpointError
from megalm.train.state import TrainState


def test_state_survives_json() -> None:
    state = TrainState(step=7, consumed_samples=56, consumed_tokens=7168, skipped_steps=1)
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


@pytest.mark.parametrize("wrong", [None, -1, 1.5, "7", True])
def test_a_damaged_count_is_named(wrong: object) -> None:
    stored = {**TrainState().to_json(), "consumed_samples": wrong}
    with pytest.raises(CheckpointError, match="consumed_samples"):
        TrainState.from_json(stored)

"""Progress survives the trip through JSON, and nothing else passes for it."""

from __future__ import annotations

import json

import pytest

from megalm.errors import CheckpointError
from megalm.train.state import LeftOut, TrainState


def test_state_survives_json() -> None:
    left_out = (LeftOut(2, 3, 8, 23), LeftOut(5, 5, 32, 39))
    state = TrainState(step=7, consumed_samples=56, consumed_tokens=7168, skipped_steps=1, left_out=left_out)
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


@pytest.mark.parametrize("wrong", [None, -1, 1.5, "7", True])
def test_a_damaged_count_is_named(wrong: object) -> None:
    stored = {**TrainState().to_json(), "consumed_samples": wrong}
    with pytest.raises(CheckpointError, match="consumed_samples"):
        TrainState.from_json(stored)


def test_what_was_left_out_may_not_be_known() -> None:
    stored = {name: value for name, value in TrainState(step=7).to_json().items() if name != "left_out"}
    assert TrainState.from_json(stored) == TrainState(step=7)


@pytest.mark.parametrize(
    "wrong", [None, {}, [[1, 2, 3, 4]], [{"first_step": 1}], [{**LeftOut(1, 2, 3, 4)._asdict(), "last_step": -1}]]
)
def test_what_was_left_out_is_steps_and_samples(wrong: object) -> None:
    with pytest.raises(CheckpointError, match="train_state.json: (left_out|last_step)"):
        TrainState.from_json({**TrainState().to_json(), "left_out": wrong})

"""The learning rate and batch size are functions of progress."""

from __future__ import annotations

import math

import pytest

from megalm.train.schedule import BatchSize, LearningRate


def test_warmup_is_linear_and_wastes_no_step() -> None:
    schedule = LearningRate(peak=1.0, minimum=0.1, warmup=4, decay=10, style="linear")
    assert [schedule.at(step, step + 1) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.at(3, 5) == schedule.at(4, 5) == 1.0


@pytest.mark.parametrize(
    ("style", "halfway", "end"), [("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_decay_reaches_the_minimum_and_stays_there(style: str, halfway: float, end: float) -> None:
    schedule = LearningRate(peak=1.0, minimum=0.1, warmup=2, decay=10, style=style)
    assert schedule.at(2, 3) == 1.0
    assert schedule.at(6, 7) == pytest.approx(halfway)
    assert schedule.at(10, 11) == schedule.at(1000, 1001) == pytest.approx(end)


def test_the_last_update_of_a_decay_to_zero_is_not_wasted() -> None:
    schedule = LearningRate(peak=1.0, minimum=0.0, warmup=0, decay=2, style="linear")
    assert [schedule.at(step, step + 1) for step in range(2)] == [1.0, 0.5]


def test_cosine_follows_the_cosine() -> None:
    schedule = LearningRate(peak=3.0, minimum=1.0, warmup=0, decay=8, style="cosine")
    for step in range(9):
        assert schedule.at(step, step + 1) == pytest.approx(1.0 + 2.0 * 0.5 * (1.0 + math.cos(math.pi * step / 8)))


def test_ramp_grows_by_the_increment_in_equal_shares_of_samples() -> None:
    ramp = BatchSize(final=8, start=2, increment=2, ramp_samples=60)
    sizes, consumed = [], 0
    while consumed < 80:
        sizes.append(ramp.at(consumed))
        consumed += sizes[-1]
    assert sizes == sorted(sizes)
    assert set(sizes) == {2, 4, 6, 8}
    assert [ramp.at(samples) for samples in (19, 20, 40, 60)] == [2, 4, 6, 8]


@pytest.mark.parametrize("ramp_samples", [0, 7, 60, 1000])
def test_steps_and_samples_count_what_a_run_would_do(ramp_samples: int) -> None:
    ramp = BatchSize(final=8, start=2, increment=2, ramp_samples=ramp_samples)
    consumed, steps = 0, 0
    while consumed < 300:
        consumed += ramp.at(consumed)
        steps += 1
    assert ramp.steps_for(300) == steps
    assert ramp.samples_for(steps) == consumed
    half = ramp.samples_for(steps // 2)
    assert ramp.steps_for(300, consumed=half) == steps - steps // 2
    assert ramp.samples_for(steps - steps // 2, consumed=half) == consumed
    assert ramp.steps_for(300, consumed=300) == 0

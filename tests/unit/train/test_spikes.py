"""A spike is found where there is one, once, and neither noise nor warm-up nor a restart is taken for one."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable

import pytest

from megalm.errors import CheckpointError
from megalm.train.spikes import LEAST_RISE_NATS, Spike, SpikeWatch
from tests.unit.config.arguments import smallest

Generator = random.Random


def spikes(losses: Iterable[float], *, watch: SpikeWatch | None = None) -> list[Spike]:
    """What is found; each time the steps of it are forgotten, as by a run that goes back."""
    watch = watch or SpikeWatch(5.0, window=100, steps=3)
    found = []
    for step, loss in enumerate(losses, start=1):
        spike = watch.see(step, loss)
        if spike is not None:
            found.append(spike)
            watch.high.clear()
    return found


def curve(step: int) -> float:
    """A training's: warm-up, then a power of the steps."""
    return 2.0 + 9.0 * math.exp(-step / 60.0) + 3.0 * (step + 50) ** -0.25


def normal(generator: Generator) -> Callable[[], float]:
    return lambda: generator.gauss(0.0, 0.05)


def heavy_tails(generator: Generator) -> Callable[[], float]:
    """Student's t with three degrees of freedom: now and then a batch lies far away."""
    return lambda: 0.05 * generator.gauss(0.0, 1.0) / math.sqrt(generator.gammavariate(1.5, 2.0) / 3.0)


def mixture(generator: Generator) -> Callable[[], float]:
    """Every tenth batch is of another corpus."""
    return lambda: (0.8 if generator.random() < 0.1 else 0.0) + generator.gauss(0.0, 0.05)


@pytest.mark.parametrize("noise", [normal, heavy_tails, mixture])
def test_no_step_of_a_noisy_training_is_a_spike(noise: Callable[[Generator], Callable[[], float]]) -> None:
    for seed in range(5):
        drawn = noise(Generator(seed))
        assert spikes(curve(step) + drawn() for step in range(3_000)) == []


def test_losses_that_differ_by_rounding_alone_are_no_spike() -> None:
    generator = Generator(0)
    rise = 0.9 * LEAST_RISE_NATS
    assert spikes(2.0 + generator.gauss(0.0, 1e-6) + (rise if step > 200 else 0.0) for step in range(400)) == []
    assert len(spikes(2.0 + (1.2 * LEAST_RISE_NATS if 200 < step < 204 else 0.0) for step in range(400))) == 1


@pytest.mark.parametrize("height, length, expected", [(1.0, 3, 1), (1.0, 2, 0), (0.2, 30, 0), (1.0, 6, 2)])
def test_a_rise_is_a_spike_after_some_steps_in_a_row(height: float, length: int, expected: int) -> None:
    draw = normal(Generator(1))
    found = spikes(2.5 + draw() + (height if 501 <= step < 501 + length else 0.0) for step in range(1, 1_000))
    assert len(found) == expected
    assert [(spike.first, spike.last) for spike in found[:1]] == ([(501, 503)] if expected else [])
    assert all(spike.loss > spike.limit > 2.5 for spike in found)


def test_what_is_too_high_raises_the_limit_only_when_it_was_noise() -> None:
    watch = SpikeWatch(5.0, window=100, steps=3)
    for step in range(1, 101):
        watch.see(step, 2.5)
    watch.see(101, 4.0)
    watch.see(102, 4.0)
    assert set(watch.losses) == {2.5}
    watch.see(103, 2.5)
    assert list(watch.losses) == [*[2.5] * 97, 4.0, 4.0, 2.5]


def test_losses_that_are_not_finite_are_passed_over() -> None:
    watch = SpikeWatch(5.0, window=10, steps=2)
    for step in range(1, 21):
        watch.see(step, 2.0)
    assert watch.see(21, 3.0) is None
    assert watch.see(22, math.nan) is None
    assert watch.see(23, math.inf) is None
    assert watch.see(24, 3.0) is not None
    assert list(watch.losses) == [2.0] * 10


def test_a_spike_begins_with_its_first_step_whatever_is_left_out_of_it() -> None:
    watch = SpikeWatch(5.0, window=10, steps=2)
    for step in range(1, 21):
        watch.see(step, 2.0)
    watch.see(21, 3.0)
    watch.see(22, math.nan)
    found = watch.see(40, 3.0)
    assert found is not None
    assert (found.first, found.last) == (21, 40)


def test_nothing_is_too_high_before_the_window_is_full() -> None:
    rising = [2.0 + step for step in range(99)]
    assert spikes(rising) == []
    watch = SpikeWatch(5.0, window=100, steps=3)
    watch.resume({"losses": [2.0] * 40, "high": [], "since": 0})
    assert spikes([4.0] * 59, watch=watch) == []


@pytest.mark.parametrize("restarts_every", [1, 7, 50])
def test_restarts_change_nothing(restarts_every: int) -> None:
    draw = normal(Generator(3))
    losses = [curve(step) + draw() + (2.0 if 700 <= step < 703 else 0.0) for step in range(1, 800)]
    watch = SpikeWatch(5.0, window=100, steps=3)
    found = []
    for step, loss in enumerate(losses, start=1):
        found.append(watch.see(step, loss))
        if step % restarts_every == 0:
            stored = json.loads(json.dumps(watch.to_json()))
            watch = SpikeWatch(5.0, window=100, steps=3)
            watch.resume(stored)
    assert [spike for spike in found if spike] == spikes(losses)
    assert [(spike.first, spike.last) for spike in found if spike] == [(700, 702)]


def test_a_shorter_window_goes_on_with_the_newest_losses() -> None:
    watch = SpikeWatch(5.0, window=3, steps=1)
    watch.resume({"losses": [9.0, 1.0, 2.0, 3.0], "high": [], "since": 0})
    assert list(watch.losses) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "losses, high, since",
    [(None, [], 0), ([1.0], None, 0), ([math.nan], [], 0), (["1"], [], 0), ([1.0], [True], 0), ([1.0], [], -1),
     (1.0, [], 0)],
)  # fmt: skip
def test_what_is_stored_is_losses(losses: object, high: object, since: object) -> None:
    watch = SpikeWatch(5.0, window=3, steps=1)
    for stored in ({"losses": losses, "high": high, "since": since}, []):
        with pytest.raises(CheckpointError, match="does not hold two lists of losses and a step"):
            watch.resume(stored)


def test_nobody_watches_unless_asked_to() -> None:
    assert SpikeWatch.from_config(smallest().training) is None
    asked = smallest("--loss-spike-threshold", "6", "--save", "x", "--save-interval", "5").training
    assert SpikeWatch.from_config(asked) == SpikeWatch(6.0, window=100, steps=3)

"""Which ranks are named, from the own times of all of them."""

from __future__ import annotations

import random
import statistics
import time

import pytest

from megalm.topology.topology import Topology
from megalm.train.stragglers import Comparison, OwnTime, Stragglers, medians_of_others


class Told:
    """A comparison of windows of ten steps, fed with milliseconds."""

    def __init__(self, stages: list[int]) -> None:
        self._comparison = Comparison(stages, lambda rank: f"rank {rank}")
        self._last = 0

    def window(self, *own: float, data: float = 0.0, step: float = 1000.0, num_samples: int = 8) -> list[str]:
        self._last += 10
        times = [OwnTime(1e-3 * one, 1e-3 * data, 1e-3 * step) for one in own]
        return self._comparison.look(times, first=self._last - 9, last=self._last, num_samples=num_samples)


def test_a_slow_rank_is_told_once_when_it_begins_and_when_it_ends() -> None:
    told = Told([0, 0, 0, 0])
    windows = [(500, 510, 505, 495), *[(500, 510, 705, 495)] * 4, *[(500, 510, 505, 495)] * 4]
    lines = [told.window(*window) for window in windows]
    begins = "rank 2 takes 205 ms a step longer than the others of its stage, 20 % of it; since step 11, told after 40"
    ends = "rank 2 takes no longer than the others of its stage any more, since step 51, told after 80"
    assert lines == [[], [], [], [begins], [], [], [], [ends], []]


@pytest.mark.parametrize("size", [2, 3, 4, 7, 16])
def test_medians_of_others_are_those_of_the_lists_without_each(size: int) -> None:
    numbers = random.Random(size)
    values = [float(numbers.randrange(10)) for _ in range(size)]
    assert medians_of_others(values) == [
        statistics.median(values[:index] + values[index + 1 :]) for index in range(size)
    ]


@pytest.mark.parametrize("num_stages", [1, 16])
def test_thousands_of_ranks_are_compared_in_a_moment(num_stages: int) -> None:
    """Every rank does it, every few steps: it may grow with the ranks, and not with their square."""

    def seconds(num_ranks: int) -> float:
        told = Told([rank % num_stages for rank in range(num_ranks)])
        numbers = random.Random(0)
        own = [numbers.uniform(500.0, 510.0) for _ in range(num_ranks)]
        durations = []
        for _ in range(3):
            started = time.process_time()
            assert told.window(*own) == []
            durations.append(time.process_time() - started)
        return min(durations)

    assert seconds(4096) < 24 * seconds(512)  # 8 times where it grows with them, 64 with their square


def test_two_slow_windows_are_not_told() -> None:
    told = Told([0, 0])
    assert [told.window(500, own) for own in (900, 900, 500, 900, 900, 500)] == [[]] * 6


def test_less_than_a_tenth_of_a_step_or_than_ten_milliseconds_is_not_told() -> None:
    told = Told([0, 0, 0])
    assert [told.window(500, 500, 599) for _ in range(4)] == [[]] * 4
    assert [told.window(5.0, 5.0, 14.9, step=20.0) for _ in range(4)] == [[]] * 4
    assert [len(told.window(5.0, 5.0, 15.1, step=20.0)) for _ in range(3)] == [0, 0, 1]


def test_stages_with_unequal_work_are_not_compared_with_each_other() -> None:
    told = Told([0, 0, 1, 1])
    assert [told.window(200, 200, 900, 900) for _ in range(4)] == [[]] * 4
    assert [len(told.window(400, 200, 900, 900)) for _ in range(3)] == [0, 0, 1]


def test_a_rank_alone_in_its_stage_is_compared_with_its_past() -> None:
    told = Told([0, 1])
    assert [told.window(200, 900) for _ in range(3)] == [[]] * 3
    assert [told.window(200, 1100, step=1200) for _ in range(2)] == [[]] * 2
    (line,) = told.window(200, 1100, step=1200)
    assert line.startswith("rank 1 takes 200 ms a step longer than it did before, 17 % of it; since step 31")


def test_ranks_alone_that_all_slow_down_or_get_larger_batches_are_not_told() -> None:
    told = Told([0, 1])
    assert [told.window(200, 900) for _ in range(3)] == [[]] * 3
    assert [told.window(500, 1200) for _ in range(4)] == [[]] * 4
    told = Told([0, 1])
    assert [told.window(200, 900) for _ in range(3)] == [[]] * 3
    assert [told.window(400, 1800, step=2000, num_samples=16) for _ in range(4)] == [[]] * 4


def test_a_rank_that_becomes_twice_as_slow_is_told_again() -> None:
    told = Told([0, 0])
    lines = [told.window(500, own) for own in (*[700] * 4, *[1000] * 4)]
    assert [len(window) for window in lines] == [0, 0, 1, 0, 0, 0, 1, 0]
    assert "takes 500 ms a step longer" in lines[6][0]


def test_waits_for_data_are_told_where_they_are_most_of_it() -> None:
    for data, said in ((150.0, True), (50.0, False)):
        told = Told([0, 0])
        for _ in range(2):
            told.window(500, 700, data=data)
        (line,) = told.window(500, 700, data=data)
        assert ("waiting for data" in line) == said


def test_one_process_compares_nothing() -> None:
    stragglers = Stragglers(Topology.solo(), interval=1)
    for step in range(1, 5):
        stragglers.add(step_seconds=1.0, waited_seconds=0.0, data_seconds=0.0)
        assert stragglers.look(step, num_samples=8) == []

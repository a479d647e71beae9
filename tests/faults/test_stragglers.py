"""H: one rank that computes slower than others, or waits longer for data, is named, and no other one is."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.faults.report import Figures
from tests.faults.trial import DP2, PP2, TP2, Clean, CleanRuns, Setting, Trial

pytestmark = pytest.mark.dist

DELAY = 0.2
MOST_STEPS = 20
"""Within which it must be named."""


def compute_slowly(rank: int, whose: int, first: int, step_calls: int) -> None:
    """From a step on, one rank takes longer in its blocks, which run so many times a step."""
    if rank != whose:
        return
    from megalm.models.blocks.block import ParallelTransformerLayer

    forward, calls = ParallelTransformerLayer.forward, iter(range(10**9))

    def slow(*arguments: Any, **options: Any) -> Any:
        if next(calls) >= (first - 1) * step_calls:
            time.sleep(DELAY / step_calls)
        return forward(*arguments, **options)

    ParallelTransformerLayer.forward = slow  # type: ignore[method-assign]


def read_slowly(rank: int, whose: int, first: int, step_batches: int) -> None:
    """From a step on, one rank's loader takes longer."""
    if rank != whose:
        return
    from megalm.train import build

    feed = build.feed

    def slow(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, batch in enumerate(feed(*arguments, **options)):
            if number >= (first - 1) * step_batches:
                time.sleep(DELAY / step_batches)
            yield batch

    build.feed = slow


@dataclass(frozen=True)
class Case:
    """A slow rank, and how often it passes what makes it slow in a step."""

    setting: Setting
    whose: int
    prepare: Any
    times: int
    place: str


CASES = {
    "PP2, rank 1 computes": Case(PP2, 1, compute_slowly, 4, "tp 0, pp 1, dp 0"),
    "PP2, rank 0 waits for data": Case(PP2, 0, read_slowly, 4, "tp 0, pp 0, dp 0"),
    "DP2, rank 0 computes": Case(DP2, 0, compute_slowly, 4, "tp 0, pp 0, dp 0"),
    "DP2, rank 1 waits for data": Case(DP2, 1, read_slowly, 2, "tp 0, pp 0, dp 1"),
    "TP2, rank 1 computes": Case(TP2, 1, compute_slowly, 8, "tp 1, pp 0, dp 0"),
    "TP2, rank 0 waits for data": Case(TP2, 0, read_slowly, 4, "tp 0, pp 0, dp 0"),
}
FIRST = (28, 26, 27)
"""From which step on it is slow: in the middle, at the beginning, and just after that of a window."""
IN_DEFAULT = ("PP2, rank 1 computes",)
SAID = re.compile(
    r"warning: rank (\d) \((.*), on \S+\) takes (\d+) ms a step longer than .*?(waiting for data)?; "
    r"since step (\d+), told after (\d+)"
)


def test_a_slow_rank_is_named_and_no_other(figures: Figures, full: bool, clean_runs: CleanRuns, tmp_path: Path) -> None:
    what = f"a rank that takes 200 ms longer a step is named within {MOST_STEPS} steps, and no other"
    with figures.count("H", what) as count:
        for name, case in CASES.items():
            for first in FIRST if full else FIRST[:1]:
                if full or name in IN_DEFAULT:
                    with count.case(f"{name}, from step {first}"):
                        _named(case, first, clean_runs.corpus, tmp_path / re.sub(r"\W+", "-", f"{name} {first}"))


def _named(case: Case, first: int, corpus: str, folder: Path) -> None:
    output = _output(case.setting, first + MOST_STEPS, corpus, folder, case=case, first=first)
    # What else a busy machine does can make a rank slow, but not by so much.
    found = [said for said in SAID.findall(output) if int(said[2]) >= 500 * DELAY]
    assert [(rank, place) for rank, place, *_ in found] == [(str(case.whose), case.place)], output
    _, _, excess, waiting, since, told = found[0]
    assert int(told) < first + MOST_STEPS, output
    assert abs(int(since) - first) < 5, output
    assert int(excess) <= 2000 * DELAY, output
    assert bool(waiting) == (case.prepare is read_slowly), output


def _output(
    setting: Setting, steps: int, corpus: str, folder: Path, *, case: Case | None = None, first: int = 0
) -> str:
    trial = Trial(Clean(replace(setting, steps=steps, interval=1000), corpus, folder), folder)
    options = {} if case is None else {"prepare": case.prepare, "arguments": (case.whose, first, case.times)}
    with trial.start("--log-straggler", "--log-level", "warning", **options) as job:
        ended = job.wait(timeout=600.0)
    assert ended.code == 0, ended.output
    return ended.output


@pytest.mark.parametrize("setting", [DP2, TP2, PP2], ids=lambda setting: setting.name)
def test_ranks_that_are_as_fast_as_others_are_not_named(
    setting: Setting, figures: Figures, full: bool, clean_runs: CleanRuns, tmp_path: Path
) -> None:
    if not full:
        pytest.skip("--full: what else a busy machine does can make a rank slow")
    with figures.count("H", f"false alarms in 1,000 steps, {setting.name}: none") as count, count.case("1,000 steps"):
        output = _output(setting, 1000, clean_runs.corpus, tmp_path / "run")
        assert "a step longer than" not in output, output

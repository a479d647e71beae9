"""F: ranks that stop, wait for ever or sleep: the run ends, and says which rank does what."""

from __future__ import annotations

import importlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megalm.train.watchdog import EXIT_HUNG
from tests.faults.report import Figures
from tests.faults.trial import DP2, PP2, TP2, Clean, CleanRuns, Setting, Trial

pytestmark = pytest.mark.dist

LIMIT_SECONDS = 3.0
PART_SECONDS = 4.0
"""In place of hours for each part of a start and of an end."""
EVALUATING = ("--split", "80,20,0", "--eval-iters", "4", "training.eval_interval=7")
FOR_EVER = 600.0
BUILD, ASSEMBLY = "megalm.train.build", "megalm.train.assembly"


def sleeps_for_ever(*_: Any, **__: Any) -> Any:
    """Its name is looked for in the stacks."""
    time.sleep(FOR_EVER)


def stops_itself(*_: Any, **__: Any) -> Any:
    """As kill -STOP would, after its watchdog has told the others where it is."""
    time.sleep(LIMIT_SECONDS / 5.0)
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep_in_data(rank: int, whose: int, num_batches: int) -> None:
    """The loader of one rank gives so many batches, and then none for ever."""
    if rank != whose:
        return
    from megalm.train import build

    feed = build.feed

    def stuck(*arguments: Any, evaluating: bool = False, **options: Any) -> Iterator[Any]:
        batches = feed(*arguments, evaluating=evaluating, **options)
        for number, batch in enumerate(batches):
            if not evaluating and number >= num_batches:
                sleeps_for_ever()
            yield batch

    build.feed = stuck


def sleep_in(
    rank: int, whose: int, module: str, name: str, call: int, instead: Callable[..., Any] = sleeps_for_ever
) -> None:
    """The `call`-th call of a function never returns on one rank."""
    if rank != whose:
        return
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    function, calls = getattr(owner, last), iter(range(1, 10_000))

    def counted(*arguments: Any, **options: Any) -> Any:
        return instead() if next(calls) >= call else function(*arguments, **options)

    setattr(owner, last, counted)


def sleep_in_a_part(rank: int, *arguments: Any) -> None:
    """`sleep_in`, with parts of little patience."""
    from megalm.train import build, watchdog

    watchdog.MINUTES_OF_A_PART = PART_SECONDS / 60.0
    if "meet" in arguments:
        build.meet = partial(build.meet, limit_minutes=PART_SECONDS / 60.0)
    sleep_in(rank, *arguments)


@dataclass(frozen=True)
class Case:
    """A hang, and what the report must say."""

    setting: Setting
    said: str
    """An expression that finds the line of the rank at fault."""
    prepare: Callable[..., None] | None = None
    arguments: tuple[Any, ...] = ()
    stopped: int | None = None
    """A rank that SIGSTOP halts."""
    flags: tuple[str, ...] = ()
    loads: bool = False
    steps: int = 400


def _of(setting: Setting, whose: int) -> dict[str, Case]:
    name = setting.name
    evaluation = (whose, "megalm.train.evaluation", "Evaluator.run", 2)
    save = (whose, "megalm.train.saver", "save_checkpoint", 2)
    update = (whose, "megalm.train.engine", "PipelineTrainingEngine._forward_backward_update", 6)
    return {
        f"{name}, rank {whose} stopped": Case(
            setting,
            "the process at which ranks meet"
            if whose == 0
            else rf"rank {whose} does not answer; the last it told was ",
            stopped=whose,
        ),
        f"{name}, rank {whose} sleeps in an evaluation": Case(
            setting, rf"rank {whose}: evaluation, step 14, in sleeps_for_ever", sleep_in, evaluation, flags=EVALUATING
        ),
        f"{name}, rank {whose} sleeps in a save": Case(
            setting, rf"rank {whose}: saving, step 10, in sleeps_for_ever", sleep_in, save
        ),
        f"{name}, rank {whose} sleeps in an update": Case(
            setting, rf"rank {whose}: training, step 6, in sleeps_for_ever", sleep_in, update
        ),
    }


CASES: dict[str, Case] = {
    "DP2, rank 1 waits for data": Case(
        DP2, r"rank 1: waiting for data, step 6, in sleeps_for_ever", sleep_in_data, (1, 10)
    ),
    **_of(DP2, 1),
    **_of(DP2, 0),
    "PP2, rank 0 waits for data": Case(
        PP2, r"rank 0: waiting for data, step 6, in sleeps_for_ever", sleep_in_data, (0, 20)
    ),
    **_of(PP2, 1),
    **_of(TP2, 0),
    **_of(TP2, 1),
}
PARTS: dict[str, Case] = {
    "DP2, rank 1 sleeps before it meets the others": Case(
        DP2, r"HangError: rank 1 of 2 has not come within 0.0667 minutes", sleep_in_a_part, (1, BUILD, "meet", 1)
    ),
    "PP2, rank 1 sleeps while it joins": Case(
        PP2, r"rank 1: joining the other ranks, in sleeps_for_ever", sleep_in_a_part, (1, BUILD, "start", 1)
    ),
    "DP2, rank 0 builds sample maps without end": Case(
        DP2,
        r"rank 0: opening the corpora, in sleeps_for_ever",
        sleep_in_a_part,
        (0, "megalm.data.build", "_Builder._corpus", 1),
    ),
    "TP2, rank 1 is stopped while it builds the model": Case(
        TP2,
        r"rank 1 does not answer; the last it told was building the model",
        sleep_in_a_part,
        (1, ASSEMBLY, "build_pipeline", 1, stops_itself),
        stopped=1,
    ),
    "PP2, rank 0 sleeps while it builds its engine": Case(
        PP2, r"rank 0: building the engine, in sleeps_for_ever", sleep_in_a_part, (0, ASSEMBLY, "build_engine", 1)
    ),
    "TP2, rank 1 sleeps while it loads": Case(
        TP2,
        r"rank 1: loading, in sleeps_for_ever",
        sleep_in_a_part,
        (1, "megalm.train.saver", "load_checkpoint", 1),
        loads=True,
    ),
    "DP2, rank 0 is stopped while it loads": Case(
        DP2,
        r"the process at which ranks meet",
        sleep_in_a_part,
        (0, "megalm.train.saver", "load_checkpoint", 1, stops_itself),
        stopped=0,
        loads=True,
    ),
    "DP2, rank 1 sleeps while it leaves": Case(
        DP2,
        r"rank 1: leaving the other ranks, in sleeps_for_ever",
        sleep_in_a_part,
        (1, BUILD, "stop", 1),
        steps=6,
    ),
}
"""Hangs in the parts of a start and of an end."""
IN_DEFAULT = (
    "DP2, rank 1 waits for data",
    "DP2, rank 1 stopped",
    "DP2, rank 0 stopped",
    "PP2, rank 1 sleeps in an evaluation",
    "DP2, rank 0 builds sample maps without end",
)


def test_a_hang_ends_the_run_and_names_who_is_where(
    figures: Figures, full: bool, clean_runs: CleanRuns, tmp_path: Path
) -> None:
    with figures.count("F", "stopped ranks, and waits without end for data, updates, saves, evaluations") as count:
        for name, case in CASES.items():
            if full or name in IN_DEFAULT:
                with count.case(name):
                    _hang(case, clean_runs.corpus, tmp_path / re.sub(r"\W+", "-", name))


def test_a_hang_in_a_part_of_a_start_or_an_end_ends_the_run(
    figures: Figures, full: bool, clean_runs: CleanRuns, tmp_path: Path
) -> None:
    with figures.count("F", "hangs while a run starts, loads and ends") as count:
        for name, case in PARTS.items():
            if full or name in IN_DEFAULT:
                with count.case(name):
                    _hang_in_a_part(case, clean_runs, tmp_path / re.sub(r"\W+", "-", name))


def _hang_in_a_part(case: Case, clean_runs: CleanRuns, folder: Path) -> None:
    trial = Trial(Clean(replace(case.setting, steps=case.steps), clean_runs.corpus, folder), folder)
    loaded: tuple[str, ...] = ()
    if case.loads:
        loaded = ("--load", str(clean_runs.of(replace(case.setting, steps=5)).folder), "--override-lr-scheduler")
    limit = ("--hang-timeout-minutes", str(LIMIT_SECONDS / 60.0))
    with trial.start(*limit, *loaded, prepare=case.prepare, arguments=case.arguments) as job:
        ended = job.wait(timeout=60.0)
    whose, _, name, *_ = case.arguments
    meets = name != "meet"
    assert EXIT_HUNG in ended.codes, ended.output
    assert set(ended.codes) <= {EXIT_HUNG, -signal.SIGKILL, 0 if name == "stop" else EXIT_HUNG}, ended.output
    assert ended.left == ()
    assert re.search(case.said, ended.output), ended.output
    assert ended.output.count("no rank has got any further") == int(meets), ended.output
    assert "Traceback" not in ended.output, ended.output
    stacks = {path.name: path.read_text() for path in folder.glob("hangs/*/rank_*.txt")}
    waiting = {whose} if name == "stop" else {0, 1} - {case.stopped} if meets else set()
    assert set(stacks) == {f"rank_{rank}.txt" for rank in waiting}, ended.output
    if whose in waiting:
        assert "sleeps_for_ever" in stacks[f"rank_{whose}.txt"]


def _hang(case: Case, corpus: str, folder: Path) -> None:
    trial = Trial(Clean(replace(case.setting, steps=case.steps), corpus, folder), folder)
    limit = ("--hang-timeout-minutes", str(LIMIT_SECONDS / 60.0))
    with trial.start(*limit, *case.flags, prepare=case.prepare, arguments=case.arguments) as job:
        if case.stopped is not None:
            job.wait_for(lambda: trial.reached() >= 60)
            job.send(signal.SIGSTOP, [case.stopped])
        ended = job.wait(timeout=60.0)
    assert EXIT_HUNG in ended.codes, ended.output
    assert set(ended.codes) <= {EXIT_HUNG, -signal.SIGKILL}, ended.output
    assert ended.left == ()
    assert re.search(case.said, ended.output), ended.output
    assert ended.output.count("no rank has got any further") == 1, ended.output
    stacks = {path.name: path.read_text() for path in folder.glob("hangs/step*/rank_*.txt")}
    assert set(stacks) == {f"rank_{rank}.txt" for rank in range(2) if rank != case.stopped}, ended.output
    if case.prepare is not None:
        assert "sleeps_for_ever" in stacks[f"rank_{case.arguments[0]}.txt"]


def test_steps_that_go_on_are_no_hang(figures: Figures, full: bool, clean_runs: CleanRuns, tmp_path: Path) -> None:
    """The limit is some times the longest step; saves and evaluations lie between."""
    steps = 2000 if full else 200
    flags = ["--hang-timeout-minutes", "0.05", *EVALUATING]
    with figures.count("F", f"false alarms in {steps:,} steps: none") as count, count.case(f"{steps} steps"):
        setting = replace(DP2, steps=steps, interval=50)
        ended = Trial(Clean(setting, clean_runs.corpus, tmp_path), tmp_path / "run").run(*flags)
        assert ended.code == 0, ended.output
        assert not (tmp_path / "run" / "hangs").exists()

"""B1: a run that is stopped after any step and continued is the run that was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.report import Figures
from tests.faults.trial import TP2, CleanRuns, content
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

STEPS_AFTER = 3


def continue_from_each(flags: list[str], steps: list[int], source: str, folder: str) -> dict[int, list[str]]:
    """Load the checkpoint of each step, train on, and save; returns the losses by the step that was loaded."""
    from megalm.config.parse import parse_command_line
    from megalm.topology.start import start
    from megalm.train.build import build
    from megalm.train.loop import step
    from megalm.train.prepare import prepare
    from megalm.train.watchdog import build_watchdog

    losses = {}
    topology = None
    for first in steps:
        own = [*flags, "--load", f"{source}/global_step{first}", f"output.save={folder}/to{first}"]
        plan = prepare(parse_command_line(own))
        topology = topology or start(plan.launch, tp=plan.config.parallel.tp, pp=plan.config.parallel.pp)
        run = build(plan, topology, watchdog=build_watchdog(plan.config, plan.launch, board=None))
        assert run.state.step == first
        losses[first] = [step(run).loss.hex() for _ in range(STEPS_AFTER)]
        run.saver.save_last(run.state)
    return losses


def test_resuming_at_any_step_is_bit_identical(
    figures: Figures, full: bool, clean_runs: CleanRuns, tmp_path: Path
) -> None:
    clean = clean_runs.of(replace(TP2, interval=1, steps=64))
    steps = list(range(1, 61)) if full else list(range(3, 61, 6))
    with figures.count("B1", "resumed at one step after another: losses and the next checkpoint") as count:
        outcomes = run_ranks(
            continue_from_each, 2, clean.command(tmp_path), steps, str(clean.folder), str(tmp_path), timeout=600.0
        )
        for first in steps:
            with count.case(f"step {first}"):
                expected = [clean.losses[step] for step in range(first + 1, first + 1 + STEPS_AFTER)]
                assert [outcome[first] for outcome in outcomes] == [expected, expected]
                last = first + STEPS_AFTER
                assert content(tmp_path / f"to{first}" / f"global_step{last}") == clean.hashes(last)

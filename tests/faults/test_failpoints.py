"""A2: a fault at every file operation of a save, on each rank; the operations are those that a save is seen to make."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.faults.report import Count, Figures
from tests.faults.trial import TP2, ZERO1, Clean, CleanRuns, Trial, content
from tests.support.failing_files import FailingFiles, failpoints
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

KEEP = ["--keep-last", "2"]
KILLS_OF_ONE_RUN = 40


def spoil(rank: int, folder: str, victim: int, label: str, fault: str) -> None:
    """Kill or fail one rank at one call."""
    if rank == victim:
        files = FailingFiles(folder)
        files.arm(label, fault)
        files.install()


def saves_with_faults(flags: list[str], folder: str, cases: list[tuple[int, str, str]]) -> dict[str, Any]:
    """One run that saves after every step, with one case's fault in each save; returns what happened.

    Without cases, three saves and the labels of the third one's operations.
    """
    from megalm.config.parse import parse_command_line
    from megalm.errors import CheckpointError
    from megalm.train.build import running
    from megalm.train.loop import step
    from megalm.train.prepare import prepare

    files = FailingFiles(folder)
    files.install()
    pause = time.sleep
    time.sleep = lambda seconds: pause(min(seconds, 0.01))  # between attempts
    said: list[str | None] = []
    with running(prepare(parse_command_line(flags))) as run:
        for case in range(3 + len(cases)):
            step(run)
            files.arm(None)
            if case >= 3:
                victim, label, fault = cases[case - 3]
                if run.topology.world.rank == victim:
                    files.arm(label, fault)
            try:
                run.saver.save(run.state)
                said.append("")
            except CheckpointError as error:
                said.append(str(error))
            if case >= 3 and run.topology.world.rank == victim and not files.has_struck:
                said[-1] = None
        return {"said": said, "labels": list(files.labels)}


def run_of_saves(clean: Clean, folder: Path, cases: list[tuple[int, str, str]]) -> list[dict[str, Any]]:
    flags = [*clean.command(folder), *(KEEP if not cases else [])]
    return run_ranks(saves_with_faults, clean.setting.world_size, flags, str(folder), cases)


def sample(cases: list[tuple[int, str, str]], number: int, *, seed: int) -> list[tuple[int, str, str]]:
    """Spread over every kind of operation and both ranks."""
    generator = random.Random(seed)
    kinds: dict[tuple[Any, ...], list[tuple[int, str, str]]] = {}
    for case in generator.sample(cases, len(cases)):
        kinds.setdefault((case[0], case[1].split()[0], case[2]), []).append(case)
    chosen: list[tuple[int, str, str]] = []
    while len(chosen) < min(number, len(cases)):
        for members in kinds.values():
            if members and len(chosen) < number:
                chosen.append(members.pop())
    return chosen


def check_saves_with_faults(count: Count, clean: Clean, folder: Path, cases: list[tuple[int, str, str]]) -> None:
    """Errors of the disk: one answer on every rank, and nothing published that is not whole."""
    from megalm.checkpoint.find import find_checkpoint

    outcomes = run_of_saves(clean, folder, cases)
    for step, (victim, label, fault) in enumerate(cases, start=4):
        with count.case(f"rank {victim}: {fault} at {label}"):
            said = [outcome["said"][step - 1] for outcome in outcomes]
            assert None not in said, "the operation was not reached"
            assert len(set(said)) == 1, f"the ranks disagree: {said}"
            published = folder / f"global_step{step}"
            if not said[0]:
                assert published.is_dir(), "a save that reported success published nothing"
            if published.is_dir():
                assert find_checkpoint(folder, step=step, warn=print) == published
                assert content(published) == clean.hashes(step)
            if said[0]:
                assert f"rank {victim}" in said[0]
            assert fault != "short write" or not said[0], said[0]


def check_kills(count: Count, clean: Clean, folder: Path, cases: list[tuple[int, str, str]], background: bool) -> None:
    """Kills: the run is started again after each, goes on from what is whole, and is killed in its first save."""
    trial = Trial(clean, folder, flags=[*KEEP, *(["--async-save"] if background else [])])
    ended = trial.run("--exit-interval", "3")
    assert ended.code == 75, ended.output
    for case, (victim, label, fault) in enumerate(cases):
        before, left_before = trial.newest(), len(_checkpoint_folders(folder))
        with count.case(f"rank {victim}: {fault} at {label}{' in the background' if background else ''}"):
            with trial.start(
                "--exit-interval", "1", prepare=spoil, arguments=(str(folder), victim, label, fault)
            ) as job:
                ended = job.wait()
            assert ended.codes[victim] == -signal.SIGKILL, f"case {case} did not die: {ended.codes}\n{ended.output}"
            assert ended.left == ()
            newest = trial.check()
            assert newest in (before, before + 1)
            # Killed while it removes old checkpoints, a run leaves one more than it found; a save that ends takes all.
            assert len(_checkpoint_folders(folder)) <= left_before + 1
    ended = trial.run("--exit-interval", "1")
    assert ended.code == 75, ended.output
    newest = trial.check()
    assert sorted(_checkpoint_folders(folder)) == sorted(f"global_step{newest - age}" for age in range(2))


def _checkpoint_folders(folder: Path) -> list[str]:
    """Whole checkpoints, drafts and what is being removed."""
    return [name for name in os.listdir(folder) if name.startswith("global_step")]


def test_a_fault_at_any_file_operation_of_a_save(
    figures: Figures, full: bool, clean_runs: CleanRuns, tmp_path: Path
) -> None:
    with figures.count("A2", "kill, ENOSPC, EIO, short write at the file operations of a save") as count:
        for setting in (TP2, ZERO1) if full else (TP2,):
            clean = clean_runs.of(replace(setting, interval=1, steps=64))
            recorded = run_of_saves(clean, tmp_path / f"recorded-{setting.name}", [])
            cases = [
                (rank, label, fault)
                for rank, outcome in enumerate(recorded)
                for label, fault in failpoints(outcome["labels"])
            ]
            (tmp_path / "cases.json").write_text(json.dumps(cases, indent=1))
            # Without old checkpoints to remove, one run can have a fault in every save; kills meet removals too.
            errors = [case for case in cases if case[2] != "kill" and not _removes(case[1])]
            kills = [case for case in cases if case[2] == "kill"]
            if not full:
                errors, kills = sample(errors, 50, seed=1), sample(kills, 10, seed=2)
            for start in range(0, len(errors), 60):
                name = f"errors-{setting.name}-{start}"
                check_saves_with_faults(count, clean, tmp_path / name, errors[start : start + 60])
            for background in (False, True) if full else (False,):
                for start in range(0, len(kills), KILLS_OF_ONE_RUN):
                    name = f"kills-{setting.name}-{start}-{background}"
                    part = kills[start : start + KILLS_OF_ONE_RUN]
                    check_kills(count, clean, tmp_path / name, part, background)


def _removes(label: str) -> bool:
    return "removed.tmp" in label or label.startswith(("unlink", "rmdir")) or "replace global_stepN #" in label

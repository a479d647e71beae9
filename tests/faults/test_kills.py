"""A1: kill -9 of one rank or of all, at any instant."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.report import Count, Figures
from tests.faults.trial import DP2, PP2, SETTINGS, TP2, ZERO1, CleanRuns, Setting, Trial
from tests.support.jobs import Job

pytestmark = pytest.mark.dist

LONGEST_START_SECONDS = 2.0
LONGEST_SAVE_SECONDS = 0.12


def sleep_to_a_random_instant(generator: random.Random, job: Job, trial: Trial) -> None:
    """Somewhere between the start and the end, with a preference for training and saving."""
    metrics = trial.folder / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    when = generator.choices(["any time", "training", "saving"], weights=[1, 2, 2])[0]
    if when == "any time":
        time.sleep(generator.uniform(0, LONGEST_START_SECONDS))
        return
    # A resumed run rewrites its record first, with a line that says so: the second new line is a step.
    job.wait_for(lambda: metrics.exists() and metrics.stat().st_size > before + 200)
    if when == "training":
        time.sleep(generator.uniform(0, 0.5))
    else:
        job.wait_for(lambda: any(trial.folder.glob("global_step*.tmp")))
        time.sleep(generator.uniform(0, LONGEST_SAVE_SECONDS))


def kill_until_complete(count: Count, generator: random.Random, trial: Trial, *, kills: int, lost: int) -> int:
    """Kill the run up to `kills` times, then let it come to its end; returns how often it was killed."""
    world_size = trial.clean.setting.world_size
    killed = 0
    while killed < kills:
        victims = generator.choice([list(range(world_size)), [generator.randrange(world_size)]])
        with trial.start() as job:
            sleep_to_a_random_instant(generator, job, trial)
            if not job.running:
                assert job.wait().code == 0, job.output()
                break
            job.kill(victims)
            ended = job.wait()
        if signal.SIGKILL not in [-code for code in ended.codes]:
            break  # it came to its end before the signal
        killed += 1
        with count.case(f"{trial.folder.name}: kill {killed} of ranks {victims}"):
            assert ended.left == ()
            newest = trial.check()
            assert trial.reached() - newest <= lost, f"stood at step {trial.reached()}, saved is {newest}"
    if trial.newest() < trial.clean.setting.steps:
        ended = trial.run()
        assert ended.code == 0, ended.output
    trial.check_complete()
    return killed


def chains(full: bool) -> list[tuple[Setting, bool]]:
    """(setting, asynchronous) of the runs that are killed again and again."""
    if full:
        return [(setting, background) for setting in SETTINGS for background in (False, True)]
    return [(TP2, False), (PP2, True), (DP2, True), (ZERO1, False)]


def test_kills_at_random_instants_lose_at_most_a_save_interval(
    figures: Figures, full: bool, clean_runs: CleanRuns, tmp_path: Path
) -> None:
    generator = random.Random(1)
    wanted = 300 if full else 20
    with figures.count("A1", "kill -9 of one rank or all at random instants") as count:
        runs = 0
        while count.total < wanted:
            for setting, background in chains(full):
                if count.total >= wanted:
                    break
                runs += 1
                name = f"{runs}-{setting.name}{'-async' if background else ''}"
                trial = Trial(clean_runs.of(setting), tmp_path / name, flags=["--async-save"] if background else [])
                # A save in the background is published some steps later, at the latest when the next one begins.
                lost = setting.interval * (2 if background else 1)
                kills = min(5 if not full else 10, wanted - count.total)
                kill_until_complete(count, generator, trial, kills=kills, lost=lost)

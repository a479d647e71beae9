"""E: signals and kill switches at any moment: saved once, at one step on every rank, and gone."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megalm.train.stop import EXIT_ASKED_TO_STOP
from tests.faults.report import Figures
from tests.faults.trial import PP2, CleanRuns, Trial
from tests.support.jobs import Job

pytestmark = pytest.mark.dist

EVALUATING = ("--split", "80,20,0", "--eval-iters", "40", "training.eval_interval=7")
LONG = replace(PP2, steps=120, interval=1, flags=(*PP2.flags, *EVALUATING))
SECONDS_TO_STOP = 10.0

Stop = Callable[[Job, Trial], None]


def signal_in_training(number: int, ranks: list[int]) -> Stop:
    def stop(job: Job, trial: Trial) -> None:
        job.send(number, ranks)

    return stop


def signal_in_a_save(job: Job, trial: Trial) -> None:
    job.wait_for(lambda: any(trial.folder.glob("global_step*.tmp")))
    job.send(signal.SIGTERM)


def signal_in_evaluation(job: Job, trial: Trial) -> None:
    job.wait_for(lambda: trial.reached() >= 7 and trial.reached() % 7 == 0)
    job.send(signal.SIGTERM, [1])


def signal_twice(job: Job, trial: Trial) -> None:
    job.send(signal.SIGTERM)
    time.sleep(0.02)
    job.send(signal.SIGINT)


def signal_again_in_the_last_save(job: Job, trial: Trial) -> None:
    job.send(signal.SIGTERM, [0])
    job.wait_for(lambda: any(trial.folder.glob("global_step*.tmp")))
    job.send(signal.SIGTERM)


def kill_switch(job: Job, trial: Trial) -> None:
    (trial.folder / "stop").touch()


def nothing(job: Job, trial: Trial) -> None:
    """A flag of the run does it."""


CASES: dict[str, tuple[Stop, tuple[str, ...]]] = {
    "SIGTERM to all": (signal_in_training(signal.SIGTERM, [0, 1]), ()),
    "SIGTERM to the first rank": (signal_in_training(signal.SIGTERM, [0]), ()),
    "SIGTERM to the last rank": (signal_in_training(signal.SIGTERM, [1]), ()),
    "SIGINT to all": (signal_in_training(signal.SIGINT, [0, 1]), ()),
    "SIGUSR1 to the last rank": (signal_in_training(signal.SIGUSR1, [1]), ()),
    "SIGTERM in a save": (signal_in_a_save, ()),
    "SIGTERM in a background save": (signal_in_a_save, ("--async-save",)),
    "SIGTERM in an evaluation": (signal_in_evaluation, ()),
    "SIGTERM, then SIGINT": (signal_twice, ()),
    "SIGTERM, and again in the last save": (signal_again_in_the_last_save, ()),
    "the kill-switch file": (kill_switch, ()),
    "the time limit": (nothing, ("--exit-duration-in-mins", "0.01")),
    "the step limit": (nothing, ("--exit-interval", "9")),
}


def stop_once(trial: Trial, stop: Stop) -> int:
    """Start, stop and check; returns the step of the checkpoint."""
    (trial.folder / "stop").unlink(missing_ok=True)
    with trial.start() as job:
        job.wait_for(lambda: trial.reached() >= 3)
        stop(job, trial)
        asked = time.monotonic()
        ended = job.wait()
        seconds = time.monotonic() - asked
    assert ended.codes == (EXIT_ASKED_TO_STOP, EXIT_ASKED_TO_STOP), ended.output
    assert ended.left == ()
    assert seconds < SECONDS_TO_STOP, f"{seconds:.1f} s"
    newest = trial.check()
    assert newest == trial.reached(), "the last step was not saved"
    return newest


def test_asked_to_stop_the_run_saves_this_step_and_leaves_nothing(
    figures: Figures, clean_runs: CleanRuns, tmp_path: Path
) -> None:
    every_step = clean_runs.of(LONG)
    with figures.count("E", "signals, kill switch and limits, in training, saves and evaluation, twice") as count:
        for name, (stop, flags) in CASES.items():
            with count.case(name):
                folder = tmp_path / name.replace(" ", "-").replace(",", "")
                switch = ("--kill-switch-path", str(folder / "stop"), "output.save_interval=20")
                folder.mkdir()
                stop_once(Trial(every_step, folder, flags=[*switch, *flags]), stop)

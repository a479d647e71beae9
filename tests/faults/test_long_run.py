"""J: one run, started again after every fault for as long as is asked for; it ends as the undisturbed one does."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint import layout
from megalm.checkpoint.find import find_checkpoint
from megalm.checkpoint.manifest import read_manifest, verify
from megalm.checkpoint.retention import published_checkpoints
from megalm.errors import CheckpointError
from megalm.train.stop import EXIT_ASKED_TO_STOP
from megalm.train.watchdog import EXIT_HUNG
from tests.faults.report import Count, Figures
from tests.faults.test_damage import flip_a_bit
from tests.faults.test_failpoints import spoil
from tests.faults.trial import ZERO1, Clean, CleanRuns, Trial, content, leftovers, losses, read_records
from tests.support.jobs import Job, JobEnd

pytestmark = pytest.mark.dist

INTERVAL = 10
FLAGS = (
    "--async-save", "--keep-last", "3", "--hang-timeout-minutes", str(4.0 / 60.0), "--log-level", "warning",
)  # fmt: skip
MOST_LOST = 2 * INTERVAL
"""A save in the background is published some steps later, at the latest when the next one begins."""
MOST_STEPS_A_SECOND = 150
OPERATIONS = (
    "write global_stepN.tmp/train_state.json", "fsync global_stepN.tmp/manifest.json", "replace global_stepN.tmp",
    "write latest.tmp", "open global_stepN.tmp/manifest.json",
)  # fmt: skip
"""Each of them once in a save."""
MOST_SAVES = 4
"""Of a run that is to fail in one of them."""
SECONDS_OF_A_START = 3.0
LONGEST_LIFE_SECONDS = 10.0
"""From the first checkpoint to the fault, in a run that is long."""


class LongRun:
    """The run, its supervisor, and what can happen to it."""

    def __init__(self, trial: Trial, generator: random.Random, *, longest_life_seconds: float) -> None:
        self.trial = trial
        self.draw = generator
        self._longest_life = longest_life_seconds
        self.damaged: set[Path] = set()

    def start(self, **options: Any) -> Job:
        """The same command line every time, with --load once there is something to load."""
        return self.trial.start(**options)

    def live(self, job: Job) -> None:
        """Let it save something, and go on for a while."""
        self._save_once(job)
        time.sleep(self.draw.uniform(0.0, self._longest_life))

    def _save_once(self, job: Job) -> None:
        before = self._latest()
        job.wait_for(lambda: self._latest() != before)

    def _latest(self) -> str:
        latest = self.trial.folder / layout.LATEST
        return latest.read_text() if latest.exists() else ""

    def killed(self) -> JobEnd:
        """kill -9 of one rank or of all, now and then while they start."""
        with self.start() as job:
            if self.draw.random() < 0.3:
                time.sleep(self.draw.uniform(0.0, SECONDS_OF_A_START))
            else:
                self.live(job)
            job.kill(self.draw.choice([[0], [1], [0, 1]]))
            return job.wait()

    def asked_to_stop(self) -> JobEnd:
        """A signal to one rank or to all."""
        with self.start() as job:
            self.live(job)
            job.send(self.draw.choice([signal.SIGTERM, signal.SIGUSR1]), self.draw.choice([[0], [1], [0, 1]]))
            return job.wait()

    def disk_full(self) -> JobEnd:
        """One operation of one save finds no room."""
        return self._failing("ENOSPC")

    def disk_stutters(self) -> JobEnd:
        """One operation of one save fails, and not again: some are tried again, and the run goes on."""
        return self._failing("EIO")

    def _failing(self, fault: str) -> JobEnd:
        label = f"{self.draw.choice(OPERATIONS)} #{self.draw.randrange(MOST_SAVES - 1)}"
        with self.start(prepare=spoil, arguments=(str(self.trial.folder), 0, label, fault)) as job:
            for _ in range(MOST_SAVES):
                self._save_once(job)
            job.send(signal.SIGTERM)
            return job.wait()

    def hung(self) -> JobEnd:
        """A rank stands still until the watchdog ends the run."""
        with self.start() as job:
            self.live(job)
            job.send(signal.SIGSTOP, [self.draw.randrange(2)])
            return job.wait()

    def damaged_on_disk(self) -> JobEnd:
        """A bit of the newest checkpoint flips; then the run is stopped."""
        valid = [path for _, path in published_checkpoints(self.trial.folder) if is_whole(path)]
        if len(valid) < 2:
            return self.asked_to_stop()
        newest = find_checkpoint(self.trial.folder, warn=lambda _: None)
        flip_a_bit(self.draw.choice(sorted(newest.iterdir())), self.draw)
        self.damaged.add(newest)
        ended = self.asked_to_stop()
        assert f"{newest} is damaged" in ended.output, ended.output
        return ended

    def check(self, ended: JobEnd, codes: set[int]) -> None:
        """It ended as documented, left nothing over, and lost little; on the disk all is whole but what was damaged."""
        assert set(ended.codes) & codes, ended.output
        if codes != KILLED:  # The others of a killed rank end as they can.
            assert set(ended.codes) <= codes | KILLED, ended.output
        assert ended.left == ()
        found = [(step, path, is_whole(path)) for step, path in published_checkpoints(self.trial.folder)]
        self.damaged &= {path for _, path, whole in found if not whole}
        assert [path for _, path, whole in found if not whole and path not in self.damaged] == []
        newest = max((step for step, _, whole in found if whole), default=0)
        lost = last_step(self.trial.folder / "metrics.jsonl") - newest
        assert lost <= MOST_LOST, f"{lost} steps are lost after step {newest}"


def is_whole(checkpoint: Path) -> bool:
    """Whether all hashes of a checkpoint are right."""
    try:
        return verify(checkpoint, read_manifest(checkpoint)) == []
    except CheckpointError:
        return False


Fault = tuple[Callable[[LongRun], JobEnd], set[int]]
KILLED, STOPPED, FAILED = {-signal.SIGKILL}, {EXIT_ASKED_TO_STOP}, {CheckpointError.exit_code}
FAULTS: dict[str, Fault] = {
    "killed": (LongRun.killed, KILLED),
    "asked to stop": (LongRun.asked_to_stop, STOPPED),
    "disk full": (LongRun.disk_full, FAILED),
    "disk stutters": (LongRun.disk_stutters, FAILED | STOPPED),
    "hung": (LongRun.hung, {EXIT_HUNG}),
    "damaged": (LongRun.damaged_on_disk, STOPPED),
}


def bags(generator: random.Random) -> Iterator[str]:
    """Every fault once, in any order, over and over; damage needs something to damage."""
    yield "asked to stop"
    while True:
        yield from generator.sample(sorted(FAULTS), len(FAULTS))


def disturb(count: Count, run: LongRun, *, until: float) -> None:
    """One fault after another until the time is over."""
    for number, name in enumerate(bags(run.draw)):
        if time.monotonic() > until:
            return
        act, codes = FAULTS[name]
        with count.case(f"fault {number}, {name}"):
            ended = act(run)
            run.check(ended, codes)


def last_step(path: Path) -> int:
    """The last step in a record that may be long."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        found = re.findall(rb'"step": (\d+), .*\n', file.read())
    return int(found[-1]) if found else 0


def test_a_long_run_of_random_faults_ends_as_the_undisturbed_one(
    figures: Figures, long_run_seconds: float, clean_runs: CleanRuns, tmp_path: Path
) -> None:
    setting = replace(ZERO1, flags=(*ZERO1.flags, *FLAGS), interval=INTERVAL)
    setting = replace(setting, steps=2000 + int(MOST_STEPS_A_SECOND * long_run_seconds))
    folder = tmp_path / "run"
    trial = Trial(Clean(setting, clean_runs.corpus, folder), folder)
    longest_life = min(LONGEST_LIFE_SECONDS, long_run_seconds / 20.0)
    run = LongRun(trial, random.Random(5), longest_life_seconds=longest_life)
    with figures.count("J", "random faults for long, one run: its end, bit for bit") as count:
        started = time.monotonic()
        disturb(count, run, until=started + long_run_seconds)
        with run.start() as job:
            run.live(job)
            job.send(signal.SIGTERM)
            assert job.wait().code == EXIT_ASKED_TO_STOP
        elapsed = time.monotonic() - started
        with count.case("the end"):
            last = trial.newest()
            steps = [record for record in read_records(folder / "metrics.jsonl") if record["kind"] == "train"]
            assert [record["step"] for record in steps] == list(range(1, last + 1))
            share = sum(record["step_seconds"] for record in steps) / elapsed
            count.found = f"{100 * share:.0f} % of the time in {last:,} steps that stayed"
            clean = Clean(setting, clean_runs.corpus, tmp_path / "clean")
            only = ["--exit-interval", str(last), f"output.save_interval={last}"]
            command = [*clean.command(clean.folder), *only]
            with Job(command, world_size=setting.world_size, logs=tmp_path / "logs") as job:
                ended = job.wait(timeout=60.0 + 2.0 * elapsed)
            assert ended.code == EXIT_ASKED_TO_STOP, ended.output
            assert leftovers(folder) == []
            name = layout.step_folder(last)
            assert content(folder / name) == content(clean.folder / name)
            expected = losses(clean.folder / "metrics.jsonl")
            assert {record["step"]: record["loss_hex"] for record in steps} == expected
            discarded = losses(folder / "metrics.jsonl.discarded")
            assert {step: loss for step, loss in discarded.items() if expected.get(step, loss) != loss} == {}

"""I: one rank after another dies, and the run goes on with those that are left; then with all again."""

from __future__ import annotations

import random
import signal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint.find import find_checkpoint
from megalm.checkpoint.source import read_train_state
from tests.faults.report import Figures
from tests.faults.trial import Clean, CleanRuns, Setting, Trial, losses
from tests.support.jobs import run_job
from tests.support.tiny_run import SEQ_LENGTH

pytestmark = pytest.mark.dist

BATCH = 12
"""4, 3, 2 and 1 divide it."""
FLAGS = (
    "training.micro_batch_size=1", f"training.global_batch_size={BATCH}",
    "--hidden-dropout", "0", "--attention-dropout", "0",  # Its masks depend on the layout.
)  # fmt: skip
SETTINGS = (
    Setting("ZeRO-0", 4, FLAGS, steps=30, interval=3),
    Setting("ZeRO-1", 4, (*FLAGS, "--zero-stage", "1"), steps=30, interval=3),
)
WORLDS = (4, 3, 2, 1, 4)
STEPS_EACH = 6
"""The last of which some are trained when a rank dies."""
LOSS_TOLERANCE = 1e-5
"""Relative, in fp32: gradients are summed over other parts of the batch."""


def record_samples(rank: int, folder: str) -> None:
    """Write the number of every sample that is read for training to a file of this rank, with its step."""
    from megalm.train import build

    feed = build.feed

    class Recorded:
        def __init__(self, source: Any, steps: Iterator[int]) -> None:
            self._source, self._steps = source, steps
            self._file = (Path(folder) / f"rank{rank}").open("a", encoding="ascii", buffering=1)

        def __len__(self) -> int:
            return len(self._source)

        def __getitem__(self, number: int) -> Any:
            self._file.write(f"{next(self._steps)} {number}\n")
            return self._source[number]

    def recorded(plan: Any, topology: Any, source: Any, *, consumed_samples: int, **options: Any) -> Iterator[Any]:
        own = BATCH // topology.dp.size
        read = range(consumed_samples * own // BATCH, 2**31)
        steps = (number // own + 1 for number in read)
        return feed(plan, topology, Recorded(source, steps), consumed_samples=consumed_samples, **options)

    Path(folder).mkdir(parents=True, exist_ok=True)
    build.feed = recorded


def samples_by_step(folder: Path) -> dict[int, list[int]]:
    """What all ranks of one start read, in order of the samples."""
    found: dict[int, list[int]] = defaultdict(list)
    for path in sorted(folder.glob("rank*")):
        for line in path.read_text(encoding="ascii").splitlines(keepends=True):
            if line.endswith("\n"):
                step, number = map(int, line.split())
                found[step].append(number)
    return {step: sorted(numbers) for step, numbers in found.items()}


def undisturbed(setting: Setting, corpus: str, folder: Path) -> tuple[dict[int, float], dict[int, list[int]]]:
    """Losses and samples of the run on four ranks."""
    clean = Clean(setting, corpus, folder)
    read = folder.with_suffix(".samples")
    ended = run_job(
        clean.command(folder),
        world_size=setting.world_size,
        logs=folder.with_suffix(".logs"),
        prepare=record_samples,
        arguments=(str(read),),
    )
    assert ended.code == 0, ended.output
    samples = samples_by_step(read)
    assert sorted(samples) == list(range(1, setting.steps + 1))
    assert {len(numbers) for numbers in samples.values()} == {BATCH}
    return _as_numbers(folder), samples


def _as_numbers(folder: Path) -> dict[int, float]:
    return {step: float.fromhex(loss) for step, loss in losses(folder / "metrics.jsonl").items()}


def lose_ranks(
    setting: Setting, corpus: str, folder: Path, expected: tuple[dict[int, float], dict[int, list[int]]], seed: int
) -> None:
    """Kill one rank of each world but the last, at random instants after some steps; check all that was read."""
    generator = random.Random(seed)
    newest = 0
    for start, size in enumerate(WORLDS):
        trial = Trial(Clean(replace(setting, world_size=size), corpus, folder), folder)
        read = folder.with_suffix(f".samples{start}")
        with trial.start(prepare=record_samples, arguments=(str(read),)) as job:
            if start < len(WORLDS) - 1:
                enough = newest + generator.randrange(2, STEPS_EACH)
                job.wait_for(lambda read=read, enough=enough: max(samples_by_step(read), default=0) > enough)
                victim = generator.randrange(size)
                job.kill([victim])
                ended = job.wait()
                assert ended.codes[victim] == -signal.SIGKILL, ended.output
            else:
                ended = job.wait()
                assert ended.codes == (0,) * size, ended.output
        assert ended.left == ()
        _check_samples(samples_by_step(read), expected[1], first=newest + 1)
        newest = trial.check_whole()
        assert trial.reached() - newest <= setting.interval, f"stood at step {trial.reached()}, saved is {newest}"
    assert newest == setting.steps
    found = _as_numbers(folder)
    assert found.keys() == expected[0].keys()
    different = {step: loss for step, loss in found.items() if abs(loss / expected[0][step] - 1.0) > LOSS_TOLERANCE}
    assert not different, f"expected were {[expected[0][step] for step in different]}, and not {different}"
    state = read_train_state(find_checkpoint(folder))
    assert state["consumed_samples"] == setting.steps * BATCH
    assert state["consumed_tokens"] == setting.steps * BATCH * SEQ_LENGTH


def _check_samples(read: dict[int, list[int]], expected: dict[int, list[int]], *, first: int) -> None:
    """Every step read what it should, the last one, which nobody may have finished, at least nothing else."""
    steps: Sequence[int] = sorted(read)
    assert steps == list(range(first, first + len(steps)))
    for step in steps[:-1]:
        assert read[step] == expected[step], f"samples of step {step}"
    for step in steps[-1:]:
        assert set(read[step]) <= set(expected[step]), f"samples of step {step}"


def test_the_run_goes_on_with_the_ranks_that_are_left(
    figures: Figures, full: bool, clean_runs: CleanRuns, tmp_path: Path
) -> None:
    with figures.count("I", "one of 4 ranks killed, then of 3, of 2, and the last; then 4 again") as count:
        expected = undisturbed(SETTINGS[0], clean_runs.corpus, tmp_path / "undisturbed")
        for setting in SETTINGS if full else SETTINGS[1:]:
            for seed in range(5 if full else 1):
                with count.case(f"{setting.name}, seed {seed}"):
                    lose_ranks(setting, clean_runs.corpus, tmp_path / f"{setting.name}-{seed}", expected, seed)

"""G: data that make the loss jump. The run goes back and leaves them out, and is the run that was told to by hand."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint import layout
from megalm.checkpoint.lineage import lineage_in
from megalm.checkpoint.source import read_train_state
from megalm.errors import DivergedError, LossSpikeError
from tests.faults.report import Figures
from tests.faults.test_failpoints import spoil
from tests.faults.trial import DP2, PP2, ZERO1, Clean, CleanRuns, Setting, Trial, content, losses
from tests.support.tiny_run import VOCAB_SIZE

pytestmark = pytest.mark.dist

BATCH = 8
MARGIN, STEPS, WINDOW = 3, 2, 16
WATCHING = (
    "--loss-spike-threshold", "5", "--loss-spike-window", str(WINDOW), "--loss-spike-steps", str(STEPS),
    "--loss-spike-margin", str(MARGIN),
)  # fmt: skip
ONE = Setting("one rank", 1, ())
ASYNC = replace(ZERO1, name="ZeRO-1 saving in the background", flags=(*ZERO1.flags, "--async-save"))
TP2_PP2 = Setting("TP2 x PP2", 4, ("--tensor-model-parallel-size", "2", *PP2.flags))


def poison(rank: int, first: int, last: int) -> None:
    """Batches of these steps are of random tokens, the same ones each time."""
    from megalm.train import build

    feed = build.feed

    def poisoned(plan: Any, topology: Any, *arguments: Any, consumed_samples: int, **options: Any) -> Iterator[Any]:
        per_step = BATCH // (plan.config.training.micro_batch_size * topology.dp.size)
        batches = feed(plan, topology, *arguments, consumed_samples=consumed_samples, **options)
        for number, batch in enumerate(batches):
            step, part = consumed_samples // BATCH + 1 + number // per_step, number % per_step
            if first <= step <= last:
                generator = torch.Generator().manual_seed(
                    (step * per_step + part) * topology.dp.size + topology.dp.rank
                )
                tokens, labels = torch.randint(VOCAB_SIZE, (2, *batch.tokens.shape), generator=generator)
                batch = batch._replace(tokens=tokens, labels=labels)
            yield batch

    build.feed = poisoned


def poison_and_kill(rank: int, first: int, last: int, folder: str) -> None:
    """The same; and the first rank dies when it has pointed `latest` back, and not yet written what to leave out."""
    poison(rank, first, last)
    spoil(rank, folder, 0, f"replace {layout.ROLL_BACKS}.tmp #0", "kill")


@dataclass(frozen=True)
class Case:
    """Steps of bad data in a run that saves every `interval` steps."""

    setting: Setting
    first: int
    stopped: bool = False
    """Whether the run is stopped again before it comes to what it leaves out."""
    killed: bool = False
    """Whether it is killed while it goes back, and has to do it once more."""

    @property
    def left_out(self) -> tuple[int, int]:
        return self.first - MARGIN, self.first + STEPS - 1 + MARGIN

    @property
    def goes_back_to(self) -> int:
        return (self.left_out[0] - 1) // self.setting.interval * self.setting.interval


CASES = [
    Case(replace(setting, steps=40, interval=4), first, **more)
    for setting, first, more in (
        (ONE, 26, {"stopped": True}), (TP2_PP2, 27, {}), (ONE, 24, {"killed": True}), (DP2, 25, {"stopped": True}),
        (DP2, 28, {"killed": True}), (PP2, 29, {"stopped": True}), (ZERO1, 26, {}), (ASYNC, 30, {"stopped": True}),
        (TP2_PP2, 25, {"stopped": True, "killed": True}), (PP2, 31, {}),
    )
]  # fmt: skip
IN_DEFAULT = 2


def test_a_run_that_went_back_is_the_one_that_was_told_what_to_leave_out(
    figures: Figures, full: bool, clean_runs: CleanRuns, tmp_path: Path
) -> None:
    with figures.count("G", "a spike of the loss: the run goes back, and equals a skip by hand") as count:
        for number, case in enumerate(CASES[: None if full else IN_DEFAULT]):
            with count.case(f"{case.setting.name}, step {case.first}"):
                _go_back(case, clean_runs.corpus, tmp_path / str(number))


def _go_back(case: Case, corpus: str, folder: Path) -> None:
    setting, back = case.setting, case.goes_back_to
    first, last = case.left_out
    data: dict[str, Any] = {"prepare": poison, "arguments": (case.first, case.first + STEPS + MARGIN - 1)}
    trial = Trial(Clean(setting, corpus, folder), folder, flags=[*WATCHING, "--log-level", "warning"])
    if case.killed:
        ended = trial.run(prepare=poison_and_kill, arguments=(*data["arguments"], str(folder)))
        assert ended.codes[0] == -signal.SIGKILL, ended.output
        assert (folder / layout.LATEST).read_text() == f"global_step{back}"
        assert not (folder / layout.ROLL_BACKS).exists()
    ended = trial.run(**data)
    assert ended.code == LossSpikeError.exit_code, ended.output
    assert set(ended.codes) <= {LossSpikeError.exit_code, -signal.SIGKILL}  # As launchers do when the first has ended.
    assert ended.left == ()
    assert (folder / layout.LATEST).read_text() == f"global_step{back}"
    dry = trial.run("--dry-run", **data) if case.setting == CASES[0].setting else None
    said = f"left out are steps {first} to {last}, as the loss rose at step {case.first}"
    assert dry is None or said in dry.output, dry.output
    if case.stopped:
        ended = trial.run("--exit-interval", str(first - 1), **data)
        assert ended.code == 75, ended.output
    ended = trial.run(**data)
    assert ended.code == 0, ended.output
    assert ended.output.count(said) == 1, ended.output

    told = Trial(trial.clean, folder.with_suffix(".told"), flags=["--skip-train-iteration-range", f"{first}-{last}"])
    shutil.copytree(folder / f"global_step{back}", told.folder / f"global_step{back}")
    ended = told.run(**data)
    assert ended.code == 0, ended.output
    ours, theirs = losses(folder / "metrics.jsonl"), losses(told.folder / "metrics.jsonl")
    assert list(theirs) == [step for step in range(back + 1, setting.steps + 1) if not first <= step <= last]
    assert {step: loss for step, loss in ours.items() if step > back} == theirs
    for step in range(last - last % setting.interval + setting.interval, setting.steps + 1, setting.interval):
        name = layout.step_folder(step)
        assert content(folder / name) == content(told.folder / name), name
        state = read_train_state(folder / name)
        assert state["roll_backs"] == [{"first": first, "last": last, "spike": case.first}]
        samples = {"first_sample": (first - 1) * BATCH, "last_sample": last * BATCH - 1}
        assert state["left_out"] == [{"first_step": first, "last_step": last, **samples}]
        if back + setting.interval < case.first:  # It left a checkpoint behind.
            assert [start for _, start in lineage_in(state) or ()] == [back + 1]


def test_a_spike_that_comes_again_ends_the_run(clean_runs: CleanRuns, tmp_path: Path) -> None:
    setting = replace(ONE, steps=40, interval=4)
    trial = Trial(
        Clean(setting, clean_runs.corpus, tmp_path), tmp_path / "run", flags=[*WATCHING, "--max-roll-backs", "1"]
    )
    data: dict[str, Any] = {"prepare": poison, "arguments": (30, 40)}
    assert trial.run(**data).code == LossSpikeError.exit_code
    known = (trial.folder / layout.ROLL_BACKS).read_text()
    ended = trial.run(**data)
    assert ended.code == DivergedError.exit_code, ended.output
    assert "it rose after 1 roll-backs in a row" in ended.output
    assert (trial.folder / layout.ROLL_BACKS).read_text() == known
    assert json.loads(known) == [{"first": 27, "last": 34, "spike": 30}]

"""A resumed run is the uninterrupted one: every loss and every weight, bit for bit, dropout included."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.ranks import RankFailure, run_ranks
from tests.support.tiny_run import MODEL_FLAGS, TRAINING_FLAGS, RankOutcome, train_tiny, write_corpus
from tools import inspect_checkpoint

pytestmark = pytest.mark.dist

DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
CASES = {
    "one-process": (1, []),
    "tp2-pp2-sequence-parallel": (
        4,
        ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel"],
    ),
    "dp2-zero1-bf16-recompute": (2, ["--bf16", "--zero-stage", "1", "--recompute-granularity", "full"]),
}
# How the interrupted run saves: one of them while it trains on.
SAVING = {
    "one-process": ["--keep-last", "1"],
    "tp2-pp2-sequence-parallel": [],
    "dp2-zero1-bf16-recompute": ["--async-save"],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def _train(world_size: int, flags: list[str], *, steps: int) -> list[RankOutcome]:
    return run_ranks(train_tiny, world_size, [*flags, "--train-iters", str(steps), "--lr-decay-iters", "12"])


@pytest.mark.parametrize("case", CASES)
def test_resuming_equals_never_having_stopped(case: str, corpus: str, tmp_path: Path) -> None:
    world_size, layout = CASES[case]
    flags = ["--data-path", corpus, *DROPOUT, *layout]
    whole = _train(world_size, flags, steps=12)
    first = _train(world_size, [*flags, "--save", str(tmp_path), "--save-interval", "3", *SAVING[case]], steps=7)
    second = _train(world_size, [*flags, "--load", str(tmp_path)], steps=12)
    for uninterrupted, before, after in zip(whole, first, second, strict=True):
        assert before.losses + after.losses == uninterrupted.losses
        assert after.grad_norms == uninterrupted.grad_norms[7:]
        assert after.state == uninterrupted.state
        assert after.weights.keys() == uninterrupted.weights.keys()
        for name, (value, _) in uninterrupted.weights.items():
            np.testing.assert_array_equal(after.weights[name][0], value, err_msg=name)


def test_a_checkpoint_of_another_schedule_is_refused_unless_overridden(corpus: str, tmp_path: Path) -> None:
    flags = ["--data-path", corpus]
    _train(1, [*flags, "--save", str(tmp_path)], steps=2)
    with pytest.raises(RankFailure, match="--override-lr-scheduler"):
        _train(1, [*flags, "--load", str(tmp_path), "--lr", "5e-3"], steps=3)
    (outcome,) = _train(1, [*flags, "--load", str(tmp_path), "--lr", "5e-3", "--override-lr-scheduler"], steps=3)
    assert len(outcome.losses) == 1


def test_finetune_takes_the_weights_and_starts_counting_again(corpus: str, tmp_path: Path) -> None:
    flags = ["--data-path", corpus]
    (trained,) = _train(1, [*flags, "--save", str(tmp_path)], steps=3)
    (again,) = _train(1, [*flags, "--load", str(tmp_path), "--finetune", "--lr", "1e-30"], steps=1)
    assert again.state["step"] == 1
    for name, (value, _) in trained.weights.items():
        np.testing.assert_allclose(again.weights[name][0], value, rtol=0, atol=1e-20, err_msg=name)


@pytest.mark.parametrize("saving", [[], ["--async-save"]])
def test_a_run_that_was_taken_back_counts_its_own_steps_alone(
    saving: list[str], corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 4, 6 and 8 lie between those that the run saves after it was taken back to 2."""
    run = tmp_path / "run"
    flags = ["--data-path", corpus, "--save", str(run), *saving]
    _train(1, [*flags, "--save-interval", "2"], steps=8)
    again = [*flags, "--save-interval", "5", "--keep-last", "2"]
    _train(1, [*again, "--load", str(run / "global_step2")], steps=10)
    assert _steps(run) == [4, 5, 6, 8, 10]
    for file in run.glob("global_step10/layer_*"):
        file.write_bytes(b"")
    _, line = run_ranks(report, 1, [*again, "--load", str(run / "global_step5"), "--train-iters", "20"])[0]
    assert "holds later steps than the one gone on from: global_step10, global_step8, global_step6;" in line
    assert "another attempt begins at step 6" in line
    (outcome,) = _train(1, [*again, "--load", str(run)], steps=10)
    assert len(outcome.losses) == 5
    state = json.loads((run / "global_step10" / "train_state.json").read_text())
    assert [first for _, first in state["lineage"]] == [3, 6]
    (outcome,) = _train(1, [*again, "--load", str(run)], steps=12)
    assert len(outcome.losses) == 2
    assert json.loads((run / "global_step12" / "train_state.json").read_text())["lineage"] == state["lineage"]
    assert _steps(run) == [4, 6, 8, 10, 12]
    assert inspect_checkpoint.main(["--load", str(run)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"lineage    the first attempt, attempt \S+ from step 3 on, attempt \S+ from step 6 on", said)
    assert "not of it  global_step8, global_step6, global_step4: " in said


def report(flags: list[str]) -> tuple[str, str]:
    """What `--dry-run` prints, and of that the line about --load."""
    from megalm.config.parse import parse_command_line
    from megalm.train import dry_run
    from megalm.train.prepare import prepare

    config = parse_command_line([*MODEL_FLAGS, *TRAINING_FLAGS, "--lr-decay-iters", "12", *flags])
    said = dry_run.report(prepare(config))
    return said, next(line for line in said.splitlines() if "whose hashes are verified" in line)


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("global_step")) for path in folder.glob("global_step*"))

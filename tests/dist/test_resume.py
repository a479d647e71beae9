"""A resumed run is the uninterrupted one: every loss and every weight, bit for bit, dropout included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.ranks import RankFailure, run_ranks
from tests.support.tiny_run import RankOutcome, train_tiny, write_corpus

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

"""Training that goes on from a checkpoint of BigScience's trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.config.parse import parse_command_line
from tests.dist.test_checkpoint_layouts import consolidated, load_and_save_again
from tests.support.bigscience import STEP, write_bigscience
from tests.support.ranks import run_ranks
from tests.support.tiny_run import MODEL_FLAGS, TRAINING_FLAGS, train_tiny, write_corpus

pytestmark = pytest.mark.dist

NO_DROPOUT: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "zero_stage": 1}


@pytest.mark.parametrize("drift", [0.0, 0.25], ids=["", "with copies that have drifted"])
def test_two_layouts_go_on_from_its_masters_and_moments_with_equal_losses(tmp_path: Path, drift: float) -> None:
    from tests.support.training import tiny_config

    theirs = tmp_path / "theirs" / "global_step7"
    truth = write_bigscience(theirs, tiny_config(**NO_DROPOUT), version=0, drift=drift)
    bound = 2.0**-22 if drift else 0.0  # Adding the drift, and the mean, round values below 4.
    losses = {}
    for tp in (1, 2):
        saved = tmp_path / f"tp{tp}"
        pairs = [(str(tmp_path / "theirs"), str(saved))]
        losses[tp] = run_ranks(load_and_save_again, tp, pairs, {**NO_DROPOUT, "tp": tp})[0][0]
        ours = consolidated(saved / f"global_step{STEP}")
        for name, values in truth.items():
            for key, found in (("fp32", name), ("exp_avg", f"{name} exp_avg"), ("exp_avg_sq", f"{name} exp_avg_sq")):
                assert (ours[found] - values[key]).abs().max() <= bound, found
            assert float(ours[f"{name} step"]) == STEP
    for tp, values in losses.items():
        assert len(values) == 2
        for value, first in zip(values, losses[1], strict=True):
            # The same fp32 sums in another order.
            assert float.fromhex(value) == pytest.approx(float.fromhex(first), rel=1e-5), tp


def test_the_program_counts_on_from_it(tmp_path: Path) -> None:
    data = ["--data-path", write_corpus(tmp_path)]
    write_bigscience(tmp_path / "theirs" / "global_step7", parse_command_line([*MODEL_FLAGS, *TRAINING_FLAGS, *data]))
    flags = [
        *(*data, "--load", str(tmp_path / "theirs"), "--bf16"),
        *("--train-iters", str(STEP + 2), "--lr-decay-iters", "20"),
    ]
    (outcome,) = run_ranks(train_tiny, 1, flags)
    assert outcome.state["step"] == STEP + 2
    assert outcome.state["consumed_samples"] == 28 + 2 * 8
    assert len(outcome.losses) == 2
    assert all(math.isfinite(loss) for loss in outcome.losses)

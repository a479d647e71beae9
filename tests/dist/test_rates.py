"""The learning rate of each update, as a run counts: by steps or by samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny_run import train_tiny, write_corpus

pytestmark = pytest.mark.dist

LINEAR = ["--lr", "8e-3", "--min-lr", "0", "--lr-decay-style", "linear"]


def test_rates_follow_samples_where_a_run_counts_samples_and_its_batch_grows(tmp_path: Path) -> None:
    data = ["--data-path", write_corpus(tmp_path), *LINEAR]
    # Batches of 4, 4, 8, 8, 8: a warm-up of 8 samples, and a decay over the 24 after it.
    grows = ["training.train_iters=none", "--train-samples", "32", "--rampup-batch-size", "4", "4", "8",
             "training.lr_warmup_iters=0", "--lr-warmup-samples", "8"]  # fmt: skip
    (by_samples,) = run_ranks(train_tiny, 1, [*data, *grows])
    assert by_samples.rates == pytest.approx([4e-3, 8e-3, 8e-3, 8e-3 * 2 / 3, 8e-3 / 3])
    (by_steps,) = run_ranks(train_tiny, 1, [*data, "--train-iters", "4", "--lr-warmup-iters", "2"])
    assert by_steps.rates == pytest.approx([4e-3, 8e-3, 8e-3, 4e-3])

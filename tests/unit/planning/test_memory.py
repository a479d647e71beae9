"""Predicted memory against torch's peak in runs on one H100, and how it goes with the layout."""

from __future__ import annotations

import pytest

from megalm.config.model import ModelConfig
from megalm.planning.gpus import GIB
from megalm.planning.job import Job, Spreading
from megalm.planning.memory import most_bytes, stage_bytes
from megalm.topology.layout import Layout


def bloom(hidden: int = 2048, layers: int = 24) -> Job:
    model = ModelConfig(
        num_layers=layers, hidden_size=hidden, num_heads=16, position_embedding="alibi", pad_vocab_size_to=250_880
    )
    return Job(model, 2048, 64)


@pytest.mark.parametrize("hidden, peak", [(2048, 56.2), (1024, 24.1)], ids=["1b7", "560m"])
def test_the_peaks_that_were_measured_are_predicted(hidden: int, peak: float) -> None:
    """docs/performance.md, micro-batch 8."""
    spreading = Spreading(Layout(tp=1, pp=1, dp=1), 8)
    assert most_bytes(bloom(hidden), spreading) / GIB == pytest.approx(peak, rel=0.03)


def test_recomputation_tensor_ranks_and_replicas_take_less() -> None:
    job, alone = bloom(), Spreading(Layout(tp=1, pp=1, dp=1), 8)
    for layout, more in (
        (Layout(tp=1, pp=1, dp=1), {"recompute": "activation"}),
        (Layout(tp=1, pp=1, dp=1), {"recompute": "full"}),
        (Layout(tp=2, pp=1, dp=1), {}),
        (Layout(tp=1, pp=1, dp=2), {}),
    ):
        assert most_bytes(job, Spreading(layout, 8, **more)) < most_bytes(job, alone)  # type: ignore[arg-type]
    split = Spreading(Layout(tp=2, pp=1, dp=1), 8, sequence_parallel=True)
    assert most_bytes(job, split) < most_bytes(job, Spreading(split.layout, 8))


def test_early_stages_hold_more_micro_batches() -> None:
    job, spreading = bloom(), Spreading(Layout(tp=1, pp=4, dp=1), 2)
    assert spreading.num_micro_batches(job) > 4
    assert stage_bytes(job, spreading, 1) > stage_bytes(job, spreading, 2)
    few = Job(job.model, job.seq_length, 4)  # Two micro-batches fill the first three stages alike.
    assert stage_bytes(few, spreading, 1) == stage_bytes(few, spreading, 2)


def test_ends_that_count_leave_blocks_to_the_middle() -> None:
    job = bloom(layers=22)
    even, counted = (Spreading(Layout(tp=1, pp=4, dp=1), 1, counts_ends=counts) for counts in (False, True))
    assert (even.blocks(job), even.blocks_at_ends(job)) == (6, 6)
    assert (counted.blocks(job), counted.blocks_at_ends(job)) == (6, 5)
    assert Spreading(Layout(tp=1, pp=1, dp=1), 1, counts_ends=False).blocks_at_ends(job) == 22

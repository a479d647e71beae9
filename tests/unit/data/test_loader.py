from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalm.data.batches import Batch, make_batch
from megalm.data.entropy import unigram_entropy
from megalm.data.loader import TimedBatches, batch_iterator
from megalm.data.sampler import micro_batches
from megalm.errors import DataError


class Counting:
    """Sample i is i repeated, so that a batch tells which samples it holds."""

    def __len__(self) -> int:
        return 101

    def __getitem__(self, i: int) -> npt.NDArray[np.int64]:
        return np.full(5, i)


@given(st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(0, 60))
def test_samples_of_a_step_do_not_depend_on_the_layout(micro: int, dp: int, consumed: int) -> None:
    ranks = [
        list(micro_batches(101, consumed_samples=consumed, micro_batch_size=micro, dp_rank=rank, dp_size=dp))
        for rank in range(dp)
    ]
    dealt = [i for parts in zip(*ranks, strict=True) for part in parts for i in part]
    assert dealt == list(range(consumed, consumed + len(dealt)))
    assert 101 - consumed - len(dealt) < micro * dp


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_workers_change_neither_order_nor_content(num_workers: int) -> None:
    found = batch_iterator(
        Counting(), consumed_samples=6, micro_batch_size=3, dp_rank=1, dp_size=2, num_workers=num_workers
    )
    first = [batch.tokens[:, 0].tolist() for batch in found]
    assert first[:2] == [[9, 10, 11], [15, 16, 17]]
    assert len(first) == (101 - 6) // 6


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_one_rank_cannot_read_is_told_by_that_rank(num_workers: int) -> None:
    """On its host the first rank may read other samples, and wait for this one in a collective."""

    class Damaged(Counting):
        def __getitem__(self, i: int) -> npt.NDArray[np.int64]:
            raise DataError(f"sample {i}")

    place = {"consumed_samples": 0, "micro_batch_size": 1, "dp_rank": 1, "dp_size": 2}
    with pytest.raises(DataError, match="sample 1") as failure:
        next(iter(batch_iterator(Damaged(), **place, num_workers=num_workers)))
    assert failure.value.is_of_one_rank


def test_resuming_goes_on_where_the_samples_were_consumed() -> None:
    def all_from(consumed: int) -> list[list[int]]:
        found = batch_iterator(Counting(), consumed_samples=consumed, micro_batch_size=2, dp_rank=0, dp_size=1)
        return [batch.tokens[:, 0].tolist() for batch in found]

    assert all_from(0)[7:] == all_from(14)


def test_error_in_a_reading_thread_reaches_the_caller_and_threads_end() -> None:
    class Broken(Counting):
        def __getitem__(self, i: int) -> npt.NDArray[np.int64]:
            if i == 10:
                raise RuntimeError("sample 10")
            return super().__getitem__(i)

    found = batch_iterator(Broken(), consumed_samples=0, micro_batch_size=1, dp_rank=0, dp_size=1, num_workers=2)
    with pytest.raises(RuntimeError, match="sample 10"):
        list(found)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_closing_early_ends_the_reading_threads() -> None:
    found = batch_iterator(Counting(), consumed_samples=0, micro_batch_size=1, dp_rank=0, dp_size=1, num_workers=2)
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_batch_shifts_labels_by_one() -> None:
    batch = make_batch([np.array([1, 2, 3, 4]), np.array([5, 6, 7, 8])])
    assert batch.tokens.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert batch.labels.tolist() == [[2, 3, 4], [6, 7, 8]]
    assert batch.loss_mask.tolist() == [[1.0] * 3] * 2
    assert (batch.tokens.dtype, batch.loss_mask.dtype) == (torch.int64, torch.float32)


def test_time_spent_waiting_for_batches_is_counted() -> None:
    class Slow(Counting):
        def __getitem__(self, i: int) -> npt.NDArray[np.int64]:
            time.sleep(0.01)
            return super().__getitem__(i)

    timed = TimedBatches(batch_iterator(Slow(), consumed_samples=0, micro_batch_size=1, dp_rank=0, dp_size=1))
    assert [batch.tokens[0, 0].item() for batch in itertools.islice(timed, 5)] == [0, 1, 2, 3, 4]
    assert 0.05 <= timed.seconds < 1.0
    before = timed.seconds
    time.sleep(0.02)
    assert timed.seconds == before


def test_batches_for_a_gpu_are_pinned_on_that_gpu_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextlib.contextmanager
    def entering(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", entering)
    monkeypatch.setattr(Batch, "pin", lambda batch: batch._replace(tokens=-batch.tokens))
    place = {"consumed_samples": 6, "micro_batch_size": 1, "dp_rank": 0, "dp_size": 1, "num_workers": 1}
    gpu = torch.device("cuda", 3)
    assert next(batch_iterator(Counting(), **place, pinned_for=gpu)).tokens[0, 0] == -6
    assert set(entered) == {gpu}
    entered.clear()
    assert next(batch_iterator(Counting(), **place, pinned_for=torch.device("cpu"))).tokens[0, 0] == 6
    assert entered == []


def test_unigram_entropy_of_known_frequencies() -> None:
    # Shares 1/2, 1/4, 1/4: 1.5 bits.
    tokens = [np.array([7, 7, 3], np.uint16), np.array([9], np.uint16)]
    assert unigram_entropy(tokens) == pytest.approx(1.5 * np.log(2), rel=1e-12)

"""Batches on their way to a GPU: pinned by the reading threads, copied without waiting, unchanged."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megalm.data.loader import batch_iterator

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class Numbers:
    """Sample i counts from i."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> npt.NDArray[np.int64]:
        return np.arange(i, i + 33)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_pinned_and_arrive_unchanged(num_workers: int) -> None:
    gpu = torch.device("cuda", 0)
    place = {"consumed_samples": 0, "micro_batch_size": 4, "dp_rank": 0, "dp_size": 1, "num_workers": num_workers}
    pinned = list(batch_iterator(Numbers(), **place, pinned_for=gpu))
    plain = list(batch_iterator(Numbers(), **place))
    assert len(pinned) == 16
    for ours, expected in zip(pinned, plain, strict=True):
        assert all(part.is_pinned() for part in ours)
        for there, part in zip(ours.to(gpu), expected, strict=True):
            assert there.device == gpu
            assert torch.equal(there.cpu(), part)

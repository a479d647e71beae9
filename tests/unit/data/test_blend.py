from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megalm.data import blend
from megalm.data.blend import Blend, largest_deficit, normalised, numbered_within, samples_of_each


def slow_order(weights: Sequence[float], num_samples: int) -> list[int]:
    """One choice after the other, in the double arithmetic of the other trainers."""
    counts = [0] * len(weights)
    chosen = []
    for i in range(num_samples):
        deficits = [weight * max(float(i), 1.0) - float(count) for weight, count in zip(weights, counts, strict=True)]
        best = deficits.index(max(deficits))
        counts[best] += 1
        chosen.append(best)
    return chosen


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), st.integers(0, 700))
@example([1.0, 1.0], 200)
@example([1.0, 1.0, 1.0], 500)
@example([1e-3, 1e3, 1e3], 600)
@settings(max_examples=120, deadline=None)
def test_order_equals_the_slow_version(weights: list[float], num_samples: int) -> None:
    shares = normalised(weights)
    assert largest_deficit(shares, num_samples).tolist() == slow_order(shares, num_samples)


@pytest.mark.parametrize("num_corpora", [2, 7, 300])
def test_order_computed_in_stretches_equals_the_slow_version(num_corpora: int) -> None:
    shares = normalised(np.random.default_rng(num_corpora).random(num_corpora).tolist())
    assert largest_deficit(shares, 70_000 // num_corpora + 5_000).tolist() == slow_order(
        shares, 70_000 // num_corpora + 5_000
    )


def test_each_corpus_gets_its_share() -> None:
    shares = normalised([5.0, 3.0, 2.0])
    counts = np.bincount(largest_deficit(shares, 10_000))
    assert np.abs(counts - 10_000 * np.array(shares)).max() <= 1


@given(st.lists(st.integers(0, 5), max_size=60), st.sampled_from([1, 7, 1 << 18]))
@settings(max_examples=90, deadline=None)
def test_samples_of_a_corpus_are_numbered_in_order(choices: list[int], run: int) -> None:
    seen = dict.fromkeys(range(6), 0)
    expected = []
    for choice in choices:
        expected.append(seen[choice])
        seen[choice] += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend, "NUMBERING_RUN", run)
        assert numbered_within(np.array(choices, np.int16)).tolist() == expected


class Numbers:
    def __init__(self, base: int) -> None:
        self.base = base

    def __len__(self) -> int:
        return 1_000

    def __getitem__(self, i: int) -> npt.NDArray[np.int64]:
        return np.array([self.base + i])


def test_blend_reads_every_corpus_in_order_without_a_gap() -> None:
    dealt = Blend([Numbers(0), Numbers(10_000)], [1.0, 3.0], 400)
    values = [int(dealt[i][0]) for i in range(len(dealt))]
    assert [value for value in values if value < 10_000] == list(range(100))
    assert [value for value in values if value >= 10_000] == list(range(10_000, 10_300))


def test_samples_of_each_corpus_are_counted_without_a_copy_of_the_order() -> None:
    choices = np.random.default_rng(1).integers(0, 5, 4_000_001).astype(np.int16)
    tracemalloc.start()
    try:
        counts = samples_of_each(choices, 7)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert counts == np.bincount(choices, minlength=7).tolist()
    assert peak < 8_000_000  # 8 bytes a sample are 32
    assert samples_of_each(choices[:0], 2) == [0, 0]

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megalm.data.order import BIGSCIENCE, MEGATRON_CORE, ORDERS, Order
from megalm.data.sample_map import _cut, build_sample_map
from megalm.errors import DataError


def slow_maps(
    lengths: list[int], begin: int, end: int, *, num_samples: int, seq_length: int, seed: int, threshold: float
) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """What the two trainers do, one token of state at a time."""
    per_epoch = sum(lengths[begin:end])
    num_epochs, total = 0, 0
    while num_epochs == 0 or (total - 1) // seq_length < num_samples:
        num_epochs, total = num_epochs + 1, total + per_epoch
    apart, before = False, 0
    if num_epochs > 1:
        before = ((num_epochs - 1) * per_epoch - 1) // seq_length
        apart = num_samples - before < int(threshold * ((per_epoch - 1) // seq_length))
    random = np.random.RandomState(seed)
    documents: list[int] = []
    for epochs in [num_epochs - 1, 1] if apart else [num_epochs]:
        part = np.array(list(range(begin, end)) * epochs, np.int32)
        random.shuffle(part)
        documents += part.tolist()
    count = (total - 1) // seq_length
    samples, document, offset = [(0, 0)], 0, 0
    for _ in range(count):
        left = seq_length + 1
        while left:
            left -= lengths[documents[document]] - offset
            if left <= 0:
                offset = lengths[documents[document]] + left - 1
                left = 0
            else:
                document, offset = document + 1, 0
        samples.append((document, offset))
    dealt: list[int] = []
    for first, last in [(0, before), (before, count)] if apart else [(0, count)]:
        part = np.arange(first, last, dtype=np.uint32)
        random.shuffle(part)
        dealt += part.tolist()
    return documents, samples, dealt


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=25),
    cut=st.tuples(st.integers(0, 24), st.integers(1, 25)),
    num_samples=st.integers(1, 120),
    seq_length=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    order=st.sampled_from([BIGSCIENCE, MEGATRON_CORE]),
)
@example(lengths=[0, 3, 0, 0, 5], cut=(0, 5), num_samples=7, seq_length=2, seed=1, order=BIGSCIENCE)
@settings(max_examples=200, deadline=None)
def test_maps_equal_the_slow_version_element_for_element(lengths, cut, num_samples, seq_length, seed, order) -> None:  # noqa: ANN001
    begin, end = min(cut[0], len(lengths) - 1), min(cut[1], len(lengths))
    if begin >= end or sum(lengths[begin:end]) < 2:
        return
    found = build_sample_map(
        np.array(lengths, np.int32),
        (begin, end),
        num_samples=num_samples,
        seq_length=seq_length,
        seed=seed,
        order=order,
    )
    documents, samples, dealt = slow_maps(
        lengths,
        begin,
        end,
        num_samples=num_samples,
        seq_length=seq_length,
        seed=seed,
        threshold=order.final_epoch_share,
    )
    assert found.documents.tolist() == documents
    assert [tuple(row) for row in found.samples.tolist()] == samples
    assert found.shuffle.tolist() == dealt
    assert found.num_samples >= num_samples


@given(
    lengths=st.lists(st.one_of(st.integers(0, 2**31 - 1), st.just(2**31 - 1)), min_size=1, max_size=8),
    seq_length=st.integers(2**24, 2**32),
    num_samples=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    order=st.sampled_from([BIGSCIENCE, MEGATRON_CORE]),
)
@example(lengths=[2**31 - 1] * 3, seq_length=2**30, num_samples=11, seed=1, order=BIGSCIENCE)
@settings(max_examples=60, deadline=None)
def test_maps_of_more_tokens_than_32_bits_count_equal_the_slow_version(
    lengths: list[int], seq_length: int, num_samples: int, seed: int, order: Order
) -> None:
    if num_samples * seq_length > 200 * sum(lengths):
        return
    found = build_sample_map(
        np.array(lengths, np.int32),
        (0, len(lengths)),
        num_samples=num_samples,
        seq_length=seq_length,
        seed=seed,
        order=order,
    )
    documents, samples, dealt = slow_maps(
        lengths,
        0,
        len(lengths),
        num_samples=num_samples,
        seq_length=seq_length,
        seed=seed,
        threshold=order.final_epoch_share,
    )
    assert found.documents.tolist() == documents
    assert [tuple(row) for row in found.samples.tolist()] == samples
    assert found.shuffle.tolist() == dealt


def test_orders_differ_where_the_last_epoch_is_between_their_thresholds() -> None:
    lengths = np.full(100, 10, np.int32)
    # 1,000 tokens an epoch, 99 samples of 10: 99 + 90 samples need 1.9 epochs, between 0.80 and 0.95.
    maps = {
        name: build_sample_map(lengths, (0, 100), num_samples=189, seq_length=10, seed=3, order=order)
        for name, order in ORDERS.items()
    }
    assert set(maps["bigscience"].documents[:100].tolist()) == set(range(100))
    assert set(maps["megatron-core"].documents[:100].tolist()) != set(range(100))


def test_dtypes_are_those_of_the_other_trainers() -> None:
    found = build_sample_map(np.full(9, 5, np.int32), (0, 9), num_samples=3, seq_length=4, seed=0, order=BIGSCIENCE)
    assert (found.documents.dtype, found.samples.dtype, found.shuffle.dtype) == (np.int32, np.int32, np.uint32)


def test_split_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="no token"):
        build_sample_map(np.zeros(4, np.int32), (0, 4), num_samples=1, seq_length=4, seed=0, order=BIGSCIENCE)


def test_maps_of_stored_golden_values_do_not_move() -> None:
    """The order of a run is a promise: these numbers may never change."""
    found = build_sample_map(
        np.array([5, 9, 1, 7, 3, 12], np.int32), (1, 6), num_samples=9, seq_length=6, seed=1234, order=BIGSCIENCE
    )
    assert found.documents.tolist() == GOLDEN_DOCUMENTS
    assert found.shuffle.tolist() == GOLDEN_SHUFFLE


GOLDEN_DOCUMENTS = [3, 3, 5, 2, 1, 4, 5, 1, 2, 4]
GOLDEN_SHUFFLE = [7, 3, 5, 1, 4, 8, 0, 2, 6, 9]


def test_memory_beside_the_places_of_samples_does_not_grow_with_them() -> None:
    """A run of 10^9 samples has 8 GB of them, and would have needed 40 to find them."""
    num_documents, length, seq_length = 600_000, 20, 8
    lengths = np.full(num_documents, length, np.int32)
    documents = np.arange(num_documents, dtype=np.int32)
    tracemalloc.start()
    try:
        samples = _cut(lengths, documents, num_documents * length // seq_length - 1, seq_length)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.3 * samples.nbytes  # 1.65; 3.05 with arrays of the same length beside it

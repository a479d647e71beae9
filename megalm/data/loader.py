"""Micro-batches in order, read ahead by threads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megalm.data.batches import Batch, make_batch
from megalm.data.sampler import micro_batches
from megalm.data.source import SampleSource
from megalm.errors import MegalmError

READ_AHEAD = 4
"""Micro-batches that each worker keeps ready."""


def batch_iterator(
    dataset: SampleSource,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int = 0,
    masked_eod_id: int | None = None,
    pinned_for: torch.device | None = None,
) -> Iterator[Batch]:
    """This rank's micro-batches from `consumed_samples` on, until the dataset cannot fill one for every rank.

    With `num_workers` > 0 as many threads read ahead; the order and the content are the same as with 0, which reads
    when asked. Threads suffice: a sample is a copy out of the page cache, done without holding the interpreter long.
    `masked_eod_id` is as for `make_batch`. Batches are in pinned memory if they are `pinned_for` a GPU.
    Raises, while it is read: what the dataset does, as of one rank.
    """

    def load(numbers: range) -> Batch:
        try:
            samples = [dataset[i] for i in numbers]
        except MegalmError as error:
            error.is_of_one_rank = True  # Others read other samples, or none.
            raise
        batch = make_batch(samples, masked_eod_id=masked_eod_id)
        if pinned_for is None or pinned_for.type != "cuda":
            return batch
        with torch.cuda.device(pinned_for):  # A thread starts out on GPU 0, and would take memory there.
            return batch.pin()

    parts = micro_batches(
        len(dataset),
        consumed_samples=consumed_samples,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    if num_workers == 0:
        return map(load, parts)
    return _read_ahead(load, parts, num_workers)


def _read_ahead(load: Callable[[range], Batch], parts: Iterator[range], num_workers: int) -> Iterator[Batch]:
    with ThreadPoolExecutor(num_workers, thread_name_prefix="read-ahead") as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for numbers in parts:
                waiting.append(pool.submit(load, numbers))
                if len(waiting) > num_workers * READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class TimedBatches:
    """Batches as they come, and how long their reader waited for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __iter__(self) -> TimedBatches:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - started

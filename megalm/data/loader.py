"""Micro-batches in order, read ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from megalm.data.batches import Batch, make_batch
from megalm.data.sampler import micro_batches
from megalm.data.source import SampleSource

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
    eod_id: int | None = None,
    eod_mask_loss: bool = False,
    reset_position_ids: bool = False,
    reset_attention_mask: bool = False,
    global_batch_size_at: Callable[[int], int] | None = None,
) -> Iterator[Batch]:
    """This rank's micro-batches from `consumed_samples` on, until the dataset cannot fill one for every rank.

    With `num_workers` > 0 as many threads read ahead; the order and the content are the same as with 0, which reads
    when asked. Threads suffice: a sample is a copy out of the page cache, done without holding the interpreter long.
    `global_batch_size_at` (consumed samples -> batch) is only checked: dealt in order, any ramp-up comes out right.
    """
    if global_batch_size_at is not None:
        size = global_batch_size_at(consumed_samples)
        if size % (micro_batch_size * dp_size):
            raise ValueError(f"global batch {size} is no multiple of {micro_batch_size} x {dp_size}")

    def load(numbers: range) -> Batch:
        return make_batch(
            [dataset[i] for i in numbers],
            eod_id=eod_id,
            eod_mask_loss=eod_mask_loss,
            reset_position_ids=reset_position_ids,
            reset_attention_mask=reset_attention_mask,
        )

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

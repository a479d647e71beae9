"""Which samples belong to which micro-batch of which data-parallel rank.

Samples are dealt in their order, `micro_batch_size` to rank 0, as many to rank 1, and so on. The samples of a global
batch therefore depend on nothing but how many were consumed before: neither on dp, nor on workers, nor on restarts.
"""

from __future__ import annotations

from collections.abc import Iterator


def micro_batches(
    num_samples: int, *, consumed_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> Iterator[range]:
    """Sample numbers of this rank's micro-batches, from `consumed_samples` on, as long as every rank has a full one."""
    if not 0 <= dp_rank < dp_size or micro_batch_size < 1 or consumed_samples < 0:
        raise ValueError(f"rank {dp_rank} of {dp_size}, micro-batch {micro_batch_size}, consumed {consumed_samples}")
    stride = micro_batch_size * dp_size
    for start in range(consumed_samples, num_samples - stride + 1, stride):
        first = start + dp_rank * micro_batch_size
        yield range(first, first + micro_batch_size)

"""Rows of logits in Triton: each row is read once from memory and once from the L2 cache, and written once.

A program takes one row after another. So few rows are under way at a time that the gradient, which reads each for the
second time, still finds it in the L2 cache: a row of BLOOM's vocabulary is 490 KiB.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megalm.kernels.triton_language import ceil_div, jit, next_power_of_two, tl

MOST_COLUMNS_AT_ONCE = 8192
SCALE_BLOCK = 4096
# Of the L2 cache; the rest holds what is written. H100: 50 MB, so 60 rows of BLOOM's vocabulary, 120 at tp = 2.
CACHE_SHARE = 0.6
PROGRAMS_ON_CPU = 2


@jit
def _row_statistics(row: tl.tensor, num_columns: tl.tensor, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The peak and the sum of exponentials.

    Each lane keeps its own until the row ends, so that no block waits for another thread; its eight columns share a
    peak, so that moving to a new one costs an eighth of an exponential each.
    """
    columns = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    peak = tl.full([BLOCK // 8], -1.0e38, tl.float32)
    total = tl.zeros([BLOCK // 8], tl.float32)
    for start in tl.range(0, num_columns, BLOCK, num_stages=4):
        x = tl.load(row + start + columns, mask=start + columns < num_columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, axis=1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher[:, None]), axis=1)
        peak = higher
    highest = tl.max(peak, axis=0)
    return highest, tl.sum(total * tl.exp(peak - highest), axis=0)


@jit
def _row_gradient(
    row: tl.tensor,
    num_columns: tl.tensor,
    label: tl.tensor,
    log_sum: tl.tensor,
    slope: tl.tensor,
    weight: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    columns = tl.arange(0, BLOCK)
    for start in tl.range(0, num_columns, BLOCK, num_stages=4):
        inside = start + columns < num_columns
        # Nobody reads the row again in this kernel: leave the cache to the rows of others.
        x = tl.load(row + start + columns, mask=inside, other=float("-inf"), eviction_policy="evict_first").to(
            tl.float32
        )
        gradient = tl.exp(x - log_sum) * slope - tl.where(start + columns == label, weight, 0.0)
        tl.store(row + start + columns, gradient.to(row.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@jit
def _statistics_kernel(
    logits: tl.tensor,
    peaks: tl.tensor,
    totals: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    first = tl.program_id(0)
    programs = tl.num_programs(0)
    for turn in tl.range(0, tl.cdiv(num_rows - first, programs)):
        index = first + turn * programs
        peak, total = _row_statistics(logits + index.to(tl.int64) * row_stride, num_columns, BLOCK)
        tl.store(peaks + index, peak)
        tl.store(totals + index, total)


@jit
def _gradient_kernel(
    logits: tl.tensor,
    labels: tl.tensor,
    log_sums: tl.tensor,
    weights: tl.tensor,
    z_loss: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    row_stride: tl.tensor,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """With WHOLE a row holds the whole vocabulary and log_sums is written; otherwise log_sums is read."""
    first = tl.program_id(0)
    programs = tl.num_programs(0)
    for turn in tl.range(0, tl.cdiv(num_rows - first, programs)):
        index = first + turn * programs
        row = logits + index.to(tl.int64) * row_stride
        weight = tl.load(weights + index)
        label = tl.load(labels + index)
        if WHOLE:
            peak, total = _row_statistics(row, num_columns, BLOCK)
            log_sum = peak + tl.log(total)
            tl.store(log_sums + index, log_sum)
        else:
            log_sum = tl.load(log_sums + index)
        _row_gradient(row, num_columns, label, log_sum, weight * (1.0 + 2.0 * z_loss * log_sum), weight, BLOCK)


@jit
def _scale_kernel(x: tl.tensor, factor: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> None:
    scale = tl.load(factor)
    if scale != 1.0:
        indices = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + indices, mask=indices < size, other=0.0).to(tl.float32)
        tl.store(x + indices, (value * scale).to(x.dtype.element_ty), mask=indices < size)


@functools.cache
def _device_sizes(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of the L2 cache."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, int(properties.L2_cache_size)


def _programs(logits: Tensor, *, reads_twice: bool) -> int:
    if logits.device.type != "cuda":
        return min(logits.size(0), PROGRAMS_ON_CPU)  # The interpreter: two, so that a program takes several rows.
    processors, cache_bytes = _device_sizes(logits.device)
    if not reads_twice:
        return min(logits.size(0), 4 * processors)
    in_cache = int(CACHE_SHARE * cache_bytes) // (logits.size(1) * logits.element_size())
    # At least half of the processors: fewer cannot draw the memory's whole rate.
    return min(logits.size(0), max(processors // 2, min(in_cache, 2 * processors)))


def _block(num_columns: int) -> tuple[int, int]:
    """Columns at once, and warps: 8 elements a thread. Three blocks more are on their way while one is computed."""
    block = max(512, min(MOST_COLUMNS_AT_ONCE, next_power_of_two(num_columns)))
    return block, block // 256


@torch.library.custom_op("megalm::row_statistics", mutates_args=(), schema="(Tensor logits) -> (Tensor, Tensor)")
def _row_statistics_op(logits: Tensor) -> tuple[Tensor, Tensor]:
    peak = logits.new_empty(logits.size(0), dtype=torch.float32)
    total = torch.empty_like(peak)
    block, num_warps = _block(logits.size(1))
    _statistics_kernel[(_programs(logits, reads_twice=False),)](
        logits, peak, total, *logits.shape, logits.stride(0), BLOCK=block, num_warps=num_warps
    )
    return peak, total


@_row_statistics_op.register_fake
def _(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.size(0), dtype=torch.float32), logits.new_empty(logits.size(0), dtype=torch.float32)


@torch.library.custom_op(
    "megalm::row_gradient_",
    mutates_args=("logits", "log_sum"),
    schema="(Tensor(a!) logits, Tensor labels, Tensor(b!) log_sum, Tensor weights, float z_loss, bool whole) -> ()",
)
def _row_gradient_op(
    logits: Tensor, labels: Tensor, log_sum: Tensor, weights: Tensor, z_loss: float, whole: bool
) -> None:
    block, num_warps = _block(logits.size(1))
    _gradient_kernel[(_programs(logits, reads_twice=whole),)](
        logits, labels, log_sum, weights, z_loss, *logits.shape, logits.stride(0),
        WHOLE=whole, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip


class TritonRows:
    """A `VocabularyRows` for logits of 16 or 32 bits on a GPU; overwrites them in place, without temporaries."""

    def bytes_per_logit(self, dtype: torch.dtype) -> int:
        return dtype.itemsize

    def statistics(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        peak, total = _row_statistics_op(logits)
        return peak, total

    def gradient_(self, logits: Tensor, labels: Tensor, log_sum: Tensor, weights: Tensor, *, z_loss: float) -> None:
        _row_gradient_op(logits, labels, log_sum, weights, z_loss, False)

    def log_sum_and_gradient_(self, logits: Tensor, labels: Tensor, weights: Tensor, *, z_loss: float) -> Tensor:
        log_sum = torch.empty_like(weights)
        _row_gradient_op(logits, labels, log_sum, weights, z_loss, True)
        return log_sum

    def scale_(self, x: Tensor, factor: Tensor) -> None:
        """Reads the factor on the device: a host that asked whether it is 1 would wait for the whole forward pass."""
        _scale_kernel[(ceil_div(x.numel(), SCALE_BLOCK),)](x, factor, x.numel(), BLOCK=SCALE_BLOCK, num_warps=8)

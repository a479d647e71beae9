"""Gradient sums in Triton: every byte moves once, and rows of a table are added in a fixed order.

torch's addition of a 16-bit gradient to an fp32 sum runs at half of the memory's speed (docs/log.md), and its gradient
of an embedding is a matrix as large as the table, most of it zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalm.kernels.rows import as_rows
from megalm.kernels.triton_language import ceil_div, jit, next_power_of_two, tl

BLOCK, NUM_WARPS = 4096, 8
MOST_COLUMNS, ROWS_AT_ONCE = 1024, 8


@jit
def gradient_sum_add(
    total: tl.tensor,
    gradient: tl.tensor,
    factor: tl.tensor,
    size: tl.tensor,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(gradient + places, mask=places < size, other=0.0).to(tl.float32)
    if SCALES:
        value *= tl.load(factor)
    tl.store(total + places, tl.load(total + places, mask=places < size, other=0.0) + value, mask=places < size)


@jit
def gradient_sum_add_rows(
    total: tl.tensor,
    sorted_ids: tl.tensor,
    order: tl.tensor,
    rows: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    row_stride: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The program of the first of equal ids adds the rows of all of them, ROWS at a time; the others do nothing."""
    first = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = columns < size
    own = tl.load(sorted_ids + first)
    before = tl.load(sorted_ids + first - 1, mask=first > 0, other=-1)
    if own != before:
        acc = tl.zeros([BLOCK], tl.float32)
        start = first
        found = ROWS
        while found == ROWS:
            place = start + tl.arange(0, ROWS)
            same = tl.load(sorted_ids + place, mask=place < num_rows, other=-1) == own
            source = tl.load(order + place, mask=same, other=0)
            value = tl.load(
                rows + source[:, None] * row_stride + columns[None, :], mask=same[:, None] & present[None, :], other=0.0
            )
            acc += tl.sum(value.to(tl.float32), axis=0)
            found = tl.sum(same.to(tl.int32), axis=0)
            start += ROWS
        out = total + own * size + columns
        tl.store(out, tl.load(out, mask=present, other=0.0) + acc, mask=present)


class TritonGradientSum:
    """A `GradientSumKernel` for GPUs; every run gives the same bits."""

    def add_(self, total: Tensor, gradient: Tensor, *, factor: Tensor | None = None) -> None:
        size = total.numel()
        gradient_sum_add[(ceil_div(size, BLOCK),)](
            total, gradient.contiguous(), total if factor is None else factor, size,
            SCALES=factor is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip

    def add_rows_(self, total: Tensor, ids: Tensor, rows: Tensor) -> None:
        values, size = as_rows(rows), total.size(-1)
        if values.numel() == 0:
            return
        # Stable, so that rows of one id are added in their order; negative ids come first and are what -1 stands for.
        sorted_ids, order = torch.sort(ids.clamp(min=-1), stable=True)
        block = min(MOST_COLUMNS, next_power_of_two(size))
        gradient_sum_add_rows[(values.size(0), ceil_div(size, block))](
            total, sorted_ids, order, values, values.size(0), size, values.stride(0),
            ROWS=ROWS_AT_ONCE, BLOCK=block, num_warps=max(1, block // 256),
        )  # fmt: skip

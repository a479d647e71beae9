"""Bias, dropout and addition in Triton: one pass forward and one backward, no mask in memory.

Which elements are dropped is a function of a seed, the row and the column (Philox), so that backward finds the same
ones. The seed is one number drawn from the default generator on the device: the streams of `parallel.random` decide it,
recomputation finds it again, and the host does not wait for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm.kernels.rows import as_rows, num_strips
from megalm.kernels.triton_language import ceil_div, jit, tl
from megalm.kernels.triton_sums import sum_parts

COLUMNS = 512
ROWS = 8
NUM_WARPS = 4
RESIDENT = 4
"""Programs of backward on a multiprocessor: 118 registers a thread."""


@jit
def _kept(
    seeds: tl.tensor, rows: tl.tensor, first_column: tl.tensor, threshold: tl.tensor, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """True where 31 random bits are not below the threshold. Four columns of a row share one round of Philox.

    Shapes: rows [ROWS] -> [ROWS, COLUMNS].
    """
    groups = (first_column // 4 + tl.arange(0, COLUMNS // 4))[None, :] + tl.zeros([ROWS, COLUMNS // 4], tl.int32)
    row = rows.to(tl.int32)[:, None] + groups * 0
    a, b, c, d = tl.philox(tl.load(seeds), groups, row, groups * 0, groups * 0, 7)
    bits = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [ROWS, COLUMNS])
    return (bits >> 1).to(tl.int32) >= threshold


@jit
def dropout_add_forward(
    x: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    seeds: tl.tensor,
    y: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < size)[None, :]
    elements = rows[:, None] * size + columns[None, :]
    added = tl.load(bias + columns, mask=columns < size, other=0.0).to(tl.float32)
    branch = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    branch += added[None, :]
    if DROPS:
        branch = tl.where(_kept(seeds, rows, tl.program_id(1) * COLUMNS, threshold, ROWS, COLUMNS), branch * scale, 0.0)
    stream = tl.load(residual + rows[:, None] * residual_stride + columns[None, :], mask=inside, other=0.0)
    tl.store(y + elements, (stream.to(tl.float32) + branch).to(y.dtype.element_ty), mask=inside)


@jit
def dropout_add_backward(
    dy: tl.tensor,
    seeds: tl.tensor,
    dx: tl.tensor,
    partial: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    dy_stride: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = tl.program_id(0) * ROWS
    step = tl.num_programs(0) * ROWS
    for turn in tl.range(0, tl.cdiv(num_rows - first, step)):
        rows = (first + turn * step + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < num_rows)[:, None] & (columns < size)[None, :]
        elements = rows[:, None] * size + columns[None, :]
        result = tl.load(dy + rows[:, None] * dy_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if DROPS:
            result = tl.where(
                _kept(seeds, rows, tl.program_id(1) * COLUMNS, threshold, ROWS, COLUMNS), result * scale, 0.0
            )
        total += result
        tl.store(dx + elements, result.to(dx.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0) * size + columns, tl.sum(total, axis=0), mask=columns < size)


def _threshold(prob: float) -> tuple[int, float]:
    """Of 2^31 equally likely numbers those that are dropped, and the factor on what is kept."""
    return round(prob * 2**31), 1.0 / (1.0 - prob)


@torch.library.custom_op(
    "megalm::bias_dropout_add",
    mutates_args=(),
    schema="(Tensor x, Tensor bias, Tensor residual, Tensor seed, float prob) -> Tensor",
)
def _forward(x: Tensor, bias: Tensor, residual: Tensor, seed: Tensor, prob: float) -> Tensor:
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    if y.numel():
        rows, stream = as_rows(x), as_rows(residual)
        dropout_add_forward[(ceil_div(rows.size(0), ROWS), ceil_div(x.size(-1), COLUMNS))](
            rows, bias.contiguous(), stream, seed, y, *rows.shape, rows.stride(0), stream.stride(0), *_threshold(prob),
            DROPS=prob > 0.0, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return y


@_forward.register_fake
def _(x: Tensor, bias: Tensor, residual: Tensor, seed: Tensor, prob: float) -> Tensor:
    return torch.empty_like(residual, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "megalm::bias_dropout_add_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor seed, float prob) -> (Tensor, Tensor)",
)
def _backward(dy: Tensor, seed: Tensor, prob: float) -> tuple[Tensor, Tensor]:
    """dx, and the gradient of the bias in fp32."""
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
    if not dx.numel():
        return dx, dy.new_zeros(dy.size(-1), dtype=torch.float32)
    rows = as_rows(dy)
    column_blocks = ceil_div(dy.size(-1), COLUMNS)
    strips = num_strips(ceil_div(rows.size(0), ROWS), dy.device, resident=RESIDENT, num_columns=column_blocks)
    partial = dy.new_empty((strips, dy.size(-1)), dtype=torch.float32)
    dropout_add_backward[(strips, column_blocks)](
        rows, seed, dx, partial, *rows.shape, rows.stride(0), *_threshold(prob),
        DROPS=prob > 0.0, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dx, sum_parts(partial, torch.float32)


@_backward.register_fake
def _(dy: Tensor, seed: Tensor, prob: float) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
    return dx, dy.new_empty(dy.size(-1), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, _, seed, ctx.prob = inputs
    ctx.dtypes = x.dtype, bias.dtype
    ctx.save_for_backward(seed)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dbias = torch.ops.megalm.bias_dropout_add_backward(dy, *ctx.saved_tensors, ctx.prob)
    return dx.to(ctx.dtypes[0]), dbias.to(ctx.dtypes[1]), dy, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def bias_dropout_add(x: Tensor, bias: Tensor, residual: Tensor, prob: float, training: bool) -> Tensor:
    """A `BiasDropoutAddKernel`: fp32 inside, rounded once; the bias gradient is summed in fp32.

    Without training, or with prob = 0, no random number is drawn.

    Shapes: x [..., h], bias [h], residual [..., h] -> [..., h].
    """
    drops = training and prob > 0.0
    if drops:
        seed = torch.randint(2**62, (1,), device=x.device, dtype=torch.int64)
    else:
        seed = torch.empty(1, device=x.device, dtype=torch.int64)
    y: Tensor = torch.ops.megalm.bias_dropout_add(x, bias, residual, seed, prob if drops else 0.0)
    return y

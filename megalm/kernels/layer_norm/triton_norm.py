"""LayerNorm in Triton, alone or right after the addition to the residual stream.

A program holds whole rows in registers: forward reads its input once, and backward input and gradient once. Backward
has a fixed number of programs, each of which sums its rows' parts of the weight gradients in fp32; a second
step adds the programs' sums in a fixed order. Every run gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm.kernels.rows import as_rows, num_strips
from megalm.kernels.triton_language import ceil_div, jit, next_power_of_two, tl
from megalm.kernels.triton_sums import sum_parts

TILE_ELEMENTS = 2048
MOST_ROWS = 16
# Beyond 16,384 backward spills some of its registers (740 bytes a thread): right, and slower.
WIDEST = 32768
# A row of 16,384 leaves 64 registers a thread; the sums of the weight gradients would be spilled (768 bytes).
WIDEST_WITH_SUMS = 8192
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 8, 256, 4
RESIDENT = 2
"""Programs of backward on a multiprocessor: 128 registers a thread."""


@jit
def layer_norm_forward(
    x: tl.tensor,
    residual: tl.tensor,
    branch_bias: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    y: tl.tensor,
    means: tl.tensor,
    scales: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """With ADDS, total = residual + (x + branch_bias) is written and normalised as it was written."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    present = columns < size
    inside = (rows < num_rows)[:, None] & present[None, :]
    wide_rows = rows.to(tl.int64)[:, None]
    out = wide_rows * size + columns[None, :]
    values = tl.load(x + wide_rows * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        values += tl.load(branch_bias + columns, mask=present, other=0.0).to(tl.float32)[None, :]
        values += tl.load(residual + wide_rows * residual_stride + columns[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        stored = values.to(total.dtype.element_ty)
        tl.store(total + out, stored, mask=inside)
        values = stored.to(tl.float32)
    mean = tl.sum(values, axis=1) / size
    centred = tl.where(inside, values - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / size + eps)
    w = tl.load(weight + columns, mask=present, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=present, other=0.0).to(tl.float32)
    result = centred * scale[:, None] * w[None, :] + b[None, :]
    tl.store(y + out, result.to(y.dtype.element_ty), mask=inside)
    tl.store(means + rows, mean, mask=rows < num_rows)
    tl.store(scales + rows, scale, mask=rows < num_rows)


@jit
def layer_norm_backward(
    dy: tl.tensor,
    dtotal: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    means: tl.tensor,
    scales: tl.tensor,
    dx: tl.tensor,
    partial: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    dy_stride: tl.tensor,
    dtotal_stride: tl.tensor,
    x_stride: tl.tensor,
    ADDS: tl.constexpr,
    BRANCH: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """With ADDS, dx has dtotal added. With SUMS, partial [programs, 2 or 3, size] gets the sums of dy * normalised, of
    dy and, with BRANCH, of dx."""
    columns = tl.arange(0, BLOCK)
    present = columns < size
    w = tl.load(weight + columns, mask=present, other=0.0).to(tl.float32)[None, :]
    if SUMS:
        weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        branch_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    first = tl.program_id(0) * ROWS
    step = tl.num_programs(0) * ROWS
    for turn in tl.range(0, tl.cdiv(num_rows - first, step), num_stages=STAGES):
        rows = first + turn * step + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & present[None, :]
        wide_rows = rows.to(tl.int64)[:, None]
        gradient = tl.load(dy + wide_rows * dy_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + wide_rows * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(means + rows, mask=rows < num_rows, other=0.0)[:, None]
        scale = tl.load(scales + rows, mask=rows < num_rows, other=0.0)[:, None]
        normalised = tl.where(inside, (values - mean) * scale, 0.0)
        weighted = gradient * w
        along = (tl.sum(weighted * normalised, axis=1) / size)[:, None]
        shift = (tl.sum(weighted, axis=1) / size)[:, None]
        result = (weighted - shift - normalised * along) * scale
        if SUMS:
            weight_sum += gradient * normalised
            bias_sum += gradient
        if ADDS:
            passed = wide_rows * dtotal_stride + columns[None, :]
            result += tl.load(dtotal + passed, mask=inside, other=0.0).to(tl.float32)
        if SUMS and BRANCH:
            branch_sum += tl.where(inside, result, 0.0)
        tl.store(dx + wide_rows * size + columns[None, :], result.to(dx.dtype.element_ty), mask=inside)
    if SUMS:
        sums = partial + tl.program_id(0) * (3 if BRANCH else 2) * size + columns
        tl.store(sums, tl.sum(weight_sum, axis=0), mask=present)
        tl.store(sums + size, tl.sum(bias_sum, axis=0), mask=present)
        if BRANCH:
            tl.store(sums + 2 * size, tl.sum(branch_sum, axis=0), mask=present)


@jit
def layer_norm_sums(
    dy: tl.tensor,
    dx: tl.tensor,
    x: tl.tensor,
    means: tl.tensor,
    scales: tl.tensor,
    partial: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    BRANCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The sums of `layer_norm_backward` over a strip of rows and some columns, where whole rows leave them no room."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    present = columns < size
    weight_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    bias_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    branch_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = tl.program_id(0) * ROWS
    step = tl.num_programs(0) * ROWS
    for turn in tl.range(0, tl.cdiv(num_rows - first, step)):
        rows = first + turn * step + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & present[None, :]
        wide_rows = rows.to(tl.int64)[:, None]
        gradient = tl.load(dy + wide_rows * dy_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + wide_rows * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(means + rows, mask=rows < num_rows, other=0.0)[:, None]
        scale = tl.load(scales + rows, mask=rows < num_rows, other=0.0)[:, None]
        weight_sum += gradient * (values - mean) * scale
        bias_sum += gradient
        if BRANCH:
            branch_sum += tl.load(dx + wide_rows * size + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    sums = partial + tl.program_id(0) * (3 if BRANCH else 2) * size + columns
    tl.store(sums, tl.sum(weight_sum, axis=0), mask=present)
    tl.store(sums + size, tl.sum(bias_sum, axis=0), mask=present)
    if BRANCH:
        tl.store(sums + 2 * size, tl.sum(branch_sum, axis=0), mask=present)


def tile(size: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps: 16 elements a thread."""
    block = next_power_of_two(size)
    rows = max(1, min(MOST_ROWS, TILE_ELEMENTS // block))
    return rows, block, max(1, min(32, rows * block // 512))


def backward_stages(size: int) -> int:
    """Tiles of backward in shared memory at once, the one that is computed included; long rows leave room for fewer."""
    elements = next_power_of_two(size)
    return 4 if elements <= 4096 else 2 if elements <= 8192 else 1


@torch.library.custom_op(
    "megalm::layer_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, Tensor? branch_bias, Tensor weight, Tensor bias, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    x: Tensor, residual: Tensor | None, branch_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, total (empty without a residual), mean and 1 / standard deviation of every row."""
    y, total, means, scales = _empty_results(x, residual, branch_bias, weight, bias, eps)
    rows, size = as_rows(x), x.size(-1)
    if y.numel() == 0:
        return y, total, means, scales
    weight, bias = weight.contiguous(), bias.contiguous()
    branch_bias = None if branch_bias is None else branch_bias.contiguous()
    added = rows if residual is None else as_rows(residual)
    tile_rows, block, num_warps = tile(size)
    layer_norm_forward[(ceil_div(rows.size(0), tile_rows),)](
        rows, added, weight if branch_bias is None else branch_bias, weight, bias, total, y, means, scales,
        rows.size(0), size, rows.stride(0), added.stride(0), eps,
        ADDS=residual is not None, ROWS=tile_rows, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    return y, total, means, scales


@_forward.register_fake
def _empty_results(
    x: Tensor, residual: Tensor | None, branch_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    statistics = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return y, torch.empty_like(y) if residual is not None else y.new_empty(0), statistics, torch.empty_like(statistics)


@torch.library.custom_op(
    "megalm::layer_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor mean, Tensor scale, bool branch) "
    "-> (Tensor, Tensor)",
)
def _backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, branch: bool
) -> tuple[Tensor, Tensor]:
    """dx, to which dtotal is added, and the gradients of weight, bias and, if asked for, branch bias as [2 or 3, h].

    The latter are summed in fp32 and have the dtype of the weight. In rows wider than 8,192 the branch bias's is the
    sum of dx as it was rounded.
    """
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    gradients, values, size = as_rows(dy), as_rows(x), x.size(-1)
    vectors = 3 if branch else 2
    if dx.numel() == 0:
        return dx, weight.new_zeros((vectors, size))
    added = gradients if dtotal is None else as_rows(dtotal)
    tile_rows, block, num_warps = tile(size)
    programs = num_strips(ceil_div(values.size(0), tile_rows), x.device, resident=RESIDENT)
    sums = block <= WIDEST_WITH_SUMS
    partial = x.new_empty((programs, vectors, size), dtype=torch.float32)
    layer_norm_backward[(programs,)](
        gradients, added, values, weight.contiguous(), mean, scale, dx, partial,
        values.size(0), size, gradients.stride(0), added.stride(0), values.stride(0),
        ADDS=dtotal is not None, BRANCH=branch, SUMS=sums, ROWS=tile_rows, BLOCK=block, STAGES=backward_stages(size),
        num_warps=num_warps,
    )  # fmt: skip
    if not sums:
        layer_norm_sums[(programs, ceil_div(size, SUM_COLUMNS))](
            gradients, dx, values, mean, scale, partial,
            values.size(0), size, gradients.stride(0), values.stride(0),
            BRANCH=branch, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=SUM_WARPS,
        )  # fmt: skip
    return dx, sum_parts(partial, weight.dtype)


@_backward.register_fake
def _(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, branch: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, weight.new_empty((3 if branch else 2, x.size(-1)))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, branch_bias, weight, bias, _ = inputs
    _, total, mean, scale = output
    ctx.adds, ctx.bias_dtype = residual is not None, bias.dtype
    ctx.branch_dtype = None if branch_bias is None else branch_bias.dtype
    ctx.save_for_backward(x if residual is None else total, weight, mean, scale)


def _differentiate(ctx: Any, dy: Tensor, dtotal: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, mean, scale = ctx.saved_tensors
    added, branch = (dtotal if ctx.adds else None), ctx.branch_dtype is not None
    dx, sums = torch.ops.megalm.layer_norm_backward(dy, added, x, weight, mean, scale, branch)
    dbranch = None if ctx.branch_dtype is None else sums[2].to(ctx.branch_dtype)
    return dx, dx if ctx.adds else None, dbranch, sums[0], sums[1].to(ctx.bias_dtype), None


_forward.register_autograd(_differentiate, setup_context=_keep)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The oracle's result; h up to 32,768.

    Shapes: x [..., h], weight [h], bias [h] -> [..., h].
    Raises: ValueError for a wider row.
    """
    _refuse_wide(x)
    y: Tensor = torch.ops.megalm.layer_norm(x, None, None, weight, bias, eps)[0]
    return y


def add_layer_norm(
    x: Tensor, branch_bias: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`oracle.add_layer_norm` in one pass: the sum is rounded once and normalised as it was rounded.

    Shapes: x, residual [..., h], branch_bias, weight, bias [h] -> 2 of [..., h].
    Raises: ValueError for a row wider than 32,768, or if x and the residual differ in dtype, which the sum has.
    """
    _refuse_wide(x)
    if residual.dtype != x.dtype:
        raise ValueError(f"the residual is {residual.dtype} and what is added to it {x.dtype}; give both in one dtype")
    y, total, *_ = torch.ops.megalm.layer_norm(x, residual, branch_bias, weight, bias, eps)
    return total, y


class _NormAndPass(torch.autograd.Function):
    """y and x itself, so that one kernel of backward adds the gradients that come along both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, _, mean, scale = torch.ops.megalm.layer_norm(x, None, None, weight, bias, eps)
        ctx.bias_dtype = bias.dtype
        ctx.save_for_backward(x, weight, mean, scale)
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dy, passed = gradients
        x, weight, mean, scale = ctx.saved_tensors
        dx, sums = torch.ops.megalm.layer_norm_backward(dy, passed, x, weight, mean, scale, False)
        return dx, sums[0], sums[1].to(ctx.bias_dtype), None


def layer_norm_and_pass(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`layer_norm` and `x` as it came, for a residual stream that goes on beside it: backward adds both gradients of
    `x` in fp32 in the pass that it takes anyway, and rounds the sum once.

    Shapes: x [..., h], weight [h], bias [h] -> 2 of [..., h].
    Raises: ValueError for a row wider than 32,768.
    """
    _refuse_wide(x)
    y, passed = _NormAndPass.apply(x, weight, bias, eps)
    return y, passed


def _refuse_wide(x: Tensor) -> None:
    if x.size(-1) > WIDEST:
        raise ValueError(f"the Triton LayerNorm holds rows of at most {WIDEST} elements, not {x.size(-1)}")

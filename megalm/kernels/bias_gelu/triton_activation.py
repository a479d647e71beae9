"""Bias and activation in Triton: one pass forward; backward recomputes from the input and adds up the bias gradient.

Nothing is kept but the two inputs. In backward a program goes down a strip of rows and sums the gradient of its columns
in fp32 as it writes it; a second step adds the strips in a fixed order, so that every run gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm.kernels.rows import as_rows, num_strips
from megalm.kernels.triton_language import ceil_div, jit, tl
from megalm.kernels.triton_sums import sum_parts

ACTIVATIONS = ("gelu_tanh", "liglu", "reglu", "swiglu", "geglu")
ROWS, COLUMNS = 8, 512
# Forward has nothing to sum over rows: long pieces of few rows are read and written in one go.
FORWARD_ROWS, FORWARD_COLUMNS = 2, 1024
NUM_WARPS = 4
BACKWARD_STAGES = 3
# Programs of backward on a multiprocessor: 96 registers a thread, or 121 of the gated ones with twice the threads.
RESIDENT, RESIDENT_GATED = 4, 2


@jit
def _smaller_share(x: tl.tensor) -> tl.tensor:
    """(1 - |tanh(u)|) / 2 for the inner u of the tanh GELU: exp cannot overflow, and nothing cancels."""
    decay = tl.exp(-1.5957691216057308 * tl.abs(x) * (1.0 + 0.044715 * x * x))
    return decay / (1.0 + decay)


@jit
def _gelu_tanh(x: tl.tensor) -> tl.tensor:
    part = x * _smaller_share(x)
    return tl.where(x > 0, x - part, part)


@jit
def _gelu_tanh_slope(x: tl.tensor) -> tl.tensor:
    share = _smaller_share(x)
    inner_slope = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x)
    return tl.where(x > 0, 1.0 - share, share) + x * (share * (1.0 - share)) * inner_slope


@jit
def _gate(x: tl.tensor, ACTIVATION: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """act(x) and its derivative."""
    if ACTIVATION == "liglu":
        value = x
        slope = x * 0.0 + 1.0
    elif ACTIVATION == "reglu":
        value = tl.maximum(x, 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "swiglu":
        share = 1.0 / (1.0 + tl.exp(-x))
        value = x * share
        slope = share * (1.0 + x * (1.0 - share))
    else:
        share = 0.5 * (1.0 + tl.erf(0.7071067811865476 * x))
        value = x * share
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return value, slope


@jit
def activation_forward(
    x: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """size counts the columns of y; a gated x has twice as many."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < size)[None, :]
    if ACTIVATION == "gelu_tanh":
        added = tl.load(bias + columns, mask=columns < size, other=0.0).to(tl.float32)
        values = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        result = _gelu_tanh(values + added[None, :])
    else:
        wide = tl.program_id(1) * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
        present = (rows < num_rows)[:, None] & (wide < 2 * size)[None, :]
        added = tl.load(bias + wide, mask=wide < 2 * size, other=0.0).to(tl.float32)
        both = tl.load(x + rows[:, None] * x_stride + wide[None, :], mask=present, other=0.0).to(tl.float32)
        value, gate = tl.split(tl.reshape(both + added[None, :], [ROWS, COLUMNS, 2]))
        opened, _ = _gate(gate, ACTIVATION)
        result = value * opened
    tl.store(y + rows[:, None] * size + columns[None, :], result.to(y.dtype.element_ty), mask=inside)


@jit
def gelu_backward(
    dy: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    dx: tl.tensor,
    partial: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    present = columns < size
    added = tl.load(bias + columns, mask=present, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = tl.program_id(0) * ROWS
    step = tl.num_programs(0) * ROWS
    for turn in tl.range(0, tl.cdiv(num_rows - first, step), num_stages=STAGES):
        rows = (first + turn * step + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < num_rows)[:, None] & present[None, :]
        gradient = tl.load(dy + rows[:, None] * dy_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        result = gradient * _gelu_tanh_slope(values + added[None, :])
        total += result
        tl.store(dx + rows[:, None] * size + columns[None, :], result.to(dx.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0) * size + columns, tl.sum(total, axis=0), mask=present)


@jit
def gate_backward(
    dy: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    dx: tl.tensor,
    partial: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = tl.program_id(1) * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
    added = tl.load(bias + wide, mask=wide < 2 * size, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, 2 * COLUMNS], tl.float32)
    first = tl.program_id(0) * ROWS
    step = tl.num_programs(0) * ROWS
    for turn in tl.range(0, tl.cdiv(num_rows - first, step)):
        rows = (first + turn * step + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < num_rows)[:, None] & (columns < size)[None, :]
        present = (rows < num_rows)[:, None] & (wide < 2 * size)[None, :]
        gradient = tl.load(dy + rows[:, None] * dy_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        both = tl.load(x + rows[:, None] * x_stride + wide[None, :], mask=present, other=0.0).to(tl.float32)
        value, gate = tl.split(tl.reshape(both + added[None, :], [ROWS, COLUMNS, 2]))
        opened, slope = _gate(gate, ACTIVATION)
        pair = tl.join(gradient * opened, gradient * value * slope)
        result = tl.reshape(pair, [ROWS, 2 * COLUMNS])
        total += result
        tl.store(dx + rows[:, None] * (2 * size) + wide[None, :], result.to(dx.dtype.element_ty), mask=present)
    tl.store(partial + tl.program_id(0) * 2 * size + wide, tl.sum(total, axis=0), mask=wide < 2 * size)


@torch.library.custom_op(
    "megalm::bias_activation", mutates_args=(), schema="(Tensor x, Tensor bias, str activation) -> Tensor"
)
def _forward(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    y = _empty_result(x, bias, activation)
    if y.numel():
        rows = as_rows(x)
        activation_forward[(ceil_div(rows.size(0), FORWARD_ROWS), ceil_div(y.size(-1), FORWARD_COLUMNS))](
            rows, bias.contiguous(), y, rows.size(0), y.size(-1), rows.stride(0),
            ACTIVATION=activation, ROWS=FORWARD_ROWS, COLUMNS=FORWARD_COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return y


@_forward.register_fake
def _empty_result(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.size(-1) if activation == "gelu_tanh" else x.size(-1) // 2))


@torch.library.custom_op(
    "megalm::bias_activation_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor bias, str activation) -> (Tensor, Tensor)",
)
def _backward(dy: Tensor, x: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dx, and the gradient of the bias, summed in fp32."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not dx.numel():
        return dx, torch.zeros_like(bias)
    gradients, rows = as_rows(dy), as_rows(x)
    column_blocks = ceil_div(dy.size(-1), COLUMNS)
    resident = RESIDENT if activation == "gelu_tanh" else RESIDENT_GATED
    strips = num_strips(ceil_div(rows.size(0), ROWS), x.device, resident=resident, num_columns=column_blocks)
    partial = x.new_empty((strips, x.size(-1)), dtype=torch.float32)
    sizes = (rows.size(0), dy.size(-1), gradients.stride(0), rows.stride(0))
    arguments = (gradients, rows, bias.contiguous(), dx, partial, *sizes)
    grid = (strips, column_blocks)
    if activation == "gelu_tanh":
        gelu_backward[grid](*arguments, ROWS=ROWS, COLUMNS=COLUMNS, STAGES=BACKWARD_STAGES, num_warps=NUM_WARPS)
    else:
        gate_backward[grid](*arguments, ACTIVATION=activation, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=2 * NUM_WARPS)
    return dx, sum_parts(partial, bias.dtype)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.activation = inputs
    ctx.save_for_backward(x, bias)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.megalm.bias_activation_backward(dy, x, bias, ctx.activation)
    return dx, dbias, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu_tanh(x + bias), in fp32 inside, rounded once to the dtype of `x`.

    Shapes: x [..., f], bias [f] -> [..., f].
    """
    y: Tensor = torch.ops.megalm.bias_activation(x, bias, "gelu_tanh")
    return y


class TritonGlu:
    """`gated.bias_glu` with one gate, as the MLP calls an activation. Shapes: x [..., 2f], bias [2f] -> [..., f]."""

    def __init__(self, gate: str) -> None:
        assert gate in ACTIVATIONS[1:], gate
        self.gate = gate

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        if x.size(-1) % 2:
            raise ValueError(f"gated activations take pairs of features, not {x.size(-1)} features")
        y: Tensor = torch.ops.megalm.bias_activation(x, bias, self.gate)
        return y

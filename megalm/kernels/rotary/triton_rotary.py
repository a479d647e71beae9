"""Rotary position embedding in Triton: one pass; backward is the turn by the negative angles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm.kernels.triton_language import ceil_div, jit, next_power_of_two, tl

ROWS = 32
NUM_WARPS = 4


@jit
def rotary_turn(
    x: tl.tensor,
    angles: tl.tensor,
    y: tl.tensor,
    num_rows: tl.tensor,
    num_heads: tl.tensor,
    num_positions: tl.tensor,
    size: tl.tensor,
    half: tl.tensor,
    stride_batch: tl.tensor,
    stride_head: tl.tensor,
    stride_position: tl.tensor,
    sign: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    """Rows are (batch, head, position). BLOCK columns hold half of what is turned, REST what is not."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    position = rows % num_positions
    head = (rows // num_positions) % num_heads
    batch = rows // (num_positions * num_heads)
    source = x + (batch * stride_batch + head * stride_head + position * stride_position)[:, None]
    target = y + rows[:, None] * size
    inside = (rows < num_rows)[:, None] & (columns < half)[None, :]
    angle = tl.load(angles + position[:, None] * half + columns[None, :], mask=inside, other=0.0)
    cos = tl.cos(angle)
    sin = tl.sin(angle) * sign
    first = tl.load(source + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(target + columns[None, :], (first * cos - second * sin).to(y.dtype.element_ty), mask=inside)
    tl.store(target + half + columns[None, :], (second * cos + first * sin).to(y.dtype.element_ty), mask=inside)
    if REST > 0:
        others = 2 * half + tl.arange(0, REST)
        kept = (rows < num_rows)[:, None] & (others < size)[None, :]
        tl.store(target + others[None, :], tl.load(source + others[None, :], mask=kept, other=0.0), mask=kept)


@torch.library.custom_op("megalm::rotary", mutates_args=(), schema="(Tensor x, Tensor angles, float sign) -> Tensor")
def _turn(x: Tensor, angles: Tensor, sign: float) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        values = x if x.stride(-1) == 1 else x.contiguous()
        half, size = angles.size(-1), x.size(-1)
        num_rows, rest = x.numel() // size, size - 2 * half
        rotary_turn[(ceil_div(num_rows, ROWS),)](
            values, angles.contiguous(), y, num_rows, x.size(1), x.size(2), size, half, *values.stride()[:3], sign,
            ROWS=ROWS, BLOCK=next_power_of_two(half), REST=next_power_of_two(rest) if rest else 0,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return y


@_turn.register_fake
def _(x: Tensor, angles: Tensor, sign: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, angles, ctx.sign = inputs
    ctx.save_for_backward(angles)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.megalm.rotary(dy, *ctx.saved_tensors, -ctx.sign), None, None


_turn.register_autograd(_differentiate, setup_context=_keep)


def rotary(x: Tensor, angles: Tensor) -> Tensor:
    """The oracle's result in one pass.

    Shapes: x [b, n, s, d], angles [s, size / 2] fp32 -> [b, n, s, d].
    Raises: ValueError if there are fewer angles than positions, or more than pairs in a head.
    """
    if angles.size(0) != x.size(2) or 2 * angles.size(1) > x.size(3):
        raise ValueError(f"angles {tuple(angles.shape)} do not fit {x.size(2)} positions of heads of {x.size(3)}")
    y: Tensor = torch.ops.megalm.rotary(x, angles, 1.0)
    return y

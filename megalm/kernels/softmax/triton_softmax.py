"""Scale-mask-softmax in Triton: scores are read once and weights written once, with no fp32 copy of either."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm.kernels.triton_language import ceil_div, jit, next_power_of_two, tl

TILE_ELEMENTS = 4096
MOST_ROWS = 16
WIDEST = 32768


@jit
def softmax_forward(
    scores: tl.tensor,
    mask: tl.tensor,
    weights: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    num_queries: tl.tensor,
    num_heads: tl.tensor,
    mask_batch: tl.tensor,
    mask_head: tl.tensor,
    mask_query: tl.tensor,
    mask_key: tl.tensor,
    scale: tl.tensor,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Rows are (batch, head, query); the mask's strides are 0 along what it is broadcast over."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < size)[None, :]
    offsets = rows[:, None] * size + columns[None, :]
    values = tl.load(scores + offsets, mask=inside, other=0.0).to(tl.float32) * scale
    shown = inside
    if MASKED:
        query = rows % num_queries
        head = (rows // num_queries) % num_heads
        batch = rows // (num_queries * num_heads)
        places = (batch * mask_batch + head * mask_head + query * mask_query)[:, None] + columns[None, :] * mask_key
        shown = inside & (tl.load(mask + places, mask=inside, other=1) == 0)
    # The lowest fp32, not -inf: it is above no score, and a row that is masked throughout is not NaN.
    values = tl.where(shown, values, -3.4028234663852886e38)
    exponentials = tl.where(shown, tl.exp(values - tl.max(values, axis=1)[:, None]), 0.0)
    total = tl.sum(exponentials, axis=1)
    result = exponentials / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(weights + offsets, result.to(weights.dtype.element_ty), mask=inside)


@jit
def softmax_backward(
    dweights: tl.tensor,
    weights: tl.tensor,
    dscores: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < size)[None, :]
    offsets = rows[:, None] * size + columns[None, :]
    gradient = tl.load(dweights + offsets, mask=inside, other=0.0).to(tl.float32)
    share = tl.load(weights + offsets, mask=inside, other=0.0).to(tl.float32)
    result = share * (gradient - tl.sum(share * gradient, axis=1)[:, None]) * scale
    tl.store(dscores + offsets, result.to(dscores.dtype.element_ty), mask=inside)


def _tile(size: int) -> tuple[int, int, int]:
    block = next_power_of_two(size)
    rows = max(1, min(MOST_ROWS, TILE_ELEMENTS // block))
    return rows, block, max(1, min(32, rows * block // 512))


@torch.library.custom_op(
    "megalm::scale_mask_softmax", mutates_args=(), schema="(Tensor scores, Tensor? mask, float scale) -> Tensor"
)
def _forward(scores: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    values = scores.contiguous()
    weights = torch.empty_like(values)
    if not values.numel():
        return weights
    shape = (1,) * (4 - values.dim()) + tuple(values.shape)
    hidden = values if mask is None else mask.expand(shape)
    strides = (0, 0, 0, 0) if mask is None else hidden.stride()
    rows, block, num_warps = _tile(values.size(-1))
    num_rows = values.numel() // values.size(-1)
    softmax_forward[(ceil_div(num_rows, rows),)](
        values, hidden if mask is None else hidden.view(torch.uint8), weights, num_rows, values.size(-1),
        shape[2], shape[1], *strides, scale, MASKED=mask is not None, ROWS=rows, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    return weights


@_forward.register_fake
def _(scores: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "megalm::scale_mask_softmax_backward",
    mutates_args=(),
    schema="(Tensor dweights, Tensor weights, float scale) -> Tensor",
)
def _backward(dweights: Tensor, weights: Tensor, scale: float) -> Tensor:
    gradient = dweights.contiguous()
    dscores = torch.empty_like(weights)
    if weights.numel():
        rows, block, num_warps = _tile(weights.size(-1))
        num_rows = weights.numel() // weights.size(-1)
        softmax_backward[(ceil_div(num_rows, rows),)](
            gradient, weights, dscores, num_rows, weights.size(-1), scale, ROWS=rows, BLOCK=block, num_warps=num_warps
        )
    return dscores


@_backward.register_fake
def _(dweights: Tensor, weights: Tensor, scale: float) -> Tensor:
    return torch.empty_like(weights)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.scale = inputs[2]
    ctx.save_for_backward(output)


def _differentiate(ctx: Any, dweights: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.megalm.scale_mask_softmax_backward(dweights, *ctx.saved_tensors, ctx.scale), None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def scale_mask_softmax(scores: Tensor, mask: Tensor | None, *, scale: float) -> Tensor:
    """A `ScaleMaskSoftmax` for up to 32,768 keys; a row without a visible key has weights of exactly 0.

    Shapes: scores [b, n, q, k] or fewer dimensions, mask bool broadcastable to it, True = masked out -> as scores.
    Raises: ValueError for more keys or dimensions.
    """
    if scores.size(-1) > WIDEST or scores.dim() > 4:
        raise ValueError(f"the Triton softmax takes [b, n, q, k] with k at most {WIDEST}, not {tuple(scores.shape)}")
    weights: Tensor = torch.ops.megalm.scale_mask_softmax(scores, mask, scale)
    return weights

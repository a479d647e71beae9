"""Attention with ALiBi in one pass over the keys, by Triton kernels of megalm's own.

Scores, bias and mask exist in registers alone; memory holds the outputs and one log-sum-exp per query. The kernels are
operations of torch.library: torch.compile keeps them whole, autograd and recomputation know them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm.errors import KernelError
from megalm.kernels.attention.fused_projection import split_projection
from megalm.kernels.attention.triton_launch import (
    Extras,
    empty_statistics,
    empty_sums,
    launch_backward,
    launch_forward,
)
from megalm.kernels.triton_sums import sum_parts

Gradients = tuple[Tensor | None, ...]


class TritonAttention:
    """An `AttentionCore`: fewer heads of keys than of queries, documents and dropout, but no square masks."""

    sums_bias_gradient = True

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        slopes: Tensor | None,
        mask: Tensor | None,
        dropout: float,
        training: bool,
    ) -> Tensor:
        _check_shapes(q, k, v)
        starts = _checked_starts(mask, q.size(0), q.size(2))
        seed = _drawn_seed(q) if training and dropout > 0.0 else None
        result: tuple[Tensor, Tensor, Tensor] = attention(q, k, v, slopes, starts, seed, dropout)
        return result[0]

    def from_fused(
        self,
        mixed: Tensor,
        *,
        slopes: Tensor | None,
        mask: Tensor | None,
        dropout: float,
        training: bool,
        bias: Tensor | None = None,
    ) -> Tensor:
        """As the protocol has it, without a copy on the way in or out, nor of the gradient."""
        starts = _checked_starts(mask, mixed.size(1), mixed.size(0))
        seed = _drawn_seed(mixed) if training and dropout > 0.0 else None
        result: tuple[Tensor, Tensor, Tensor] = fused_attention(mixed, bias, slopes, starts, seed, dropout)
        return result[0].flatten(2)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises: ValueError where the kernels would read past the end of a tensor."""
    b, n, s, d = q.shape
    heads = k.size(1)
    if k.shape != (b, heads, s, d) or v.shape != k.shape or n % max(heads, 1):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must agree but in heads, and the {heads} "
            f"heads of k and v must divide the {n} of q"
        )


def _checked_starts(mask: Tensor | None, b: int, s: int) -> Tensor | None:
    if mask is not None and mask.dim() != 2:
        raise KernelError(
            f"the triton attention core got a mask of shape {tuple(mask.shape)}, which holds a number for every pair\n"
            "  give the first key that each query sees, int32 [b, s], or use --attention-kernel sdpa"
        )
    if mask is not None and tuple(mask.shape) != (b, s):
        raise ValueError(f"the first keys {tuple(mask.shape)} must be one for each of {b} x {s} queries")
    return None if mask is None else mask.to(torch.int32).contiguous()


def _drawn_seed(x: Tensor) -> Tensor:
    # From the generator that stands when the core is called, and left on the device: no synchronisation.
    return torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)


def _new_output(q: Tensor) -> Tensor:
    b, n, s, d = q.shape
    return q.new_empty(s, b, n, d).permute(1, 2, 0, 3)  # -> [b, n, s, d], in the order that `dense` wants


@torch.library.custom_op("megalm::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, starts: Tensor | None, seed: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, log-sum-exps and bounds; `launch_forward` has the shapes. Dropout acts if there is a seed."""
    out = _new_output(q)
    return out, *launch_forward(q, k, v, out, Extras(slopes, starts, seed, dropout))


@torch.library.custom_op("megalm::attention_backward", mutates_args=())
def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first_key: Tensor,
    slopes: Tensor | None,
    starts: Tensor | None,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each in memory order [s, b, n, d]."""
    gradients = _new_output(q), _new_output(k), _new_output(v)
    launch_backward(do, q, k, v, out, lse, first_key, gradients, Extras(slopes, starts, seed, dropout))
    return gradients


@torch.library.custom_op("megalm::fused_attention", mutates_args=())
def fused_attention(
    mixed: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    starts: Tensor | None,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention` of a fused projection, of which `bias` is already a part; it is here for its gradient.

    Shapes: mixed [s, b, n, 3, d], bias [3nd] -> [s, b, n, d], lse, first_key.
    """
    q, k, v = split_projection(mixed)
    out = mixed.new_empty(*mixed.shape[:3], mixed.size(4))  # [s, b, n, d]
    return out, *launch_forward(q, k, v, out.permute(1, 2, 0, 3), Extras(slopes, starts, seed, dropout))


@torch.library.custom_op("megalm::fused_attention_backward", mutates_args=())
def fused_attention_backward(
    do: Tensor,
    mixed: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    first_key: Tensor,
    slopes: Tensor | None,
    starts: Tensor | None,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of `mixed`, into which all three kernels write directly, and of the bias, summed in fp32.

    Shapes: do [s, b, n, d] -> as mixed, as bias (empty without one).
    """
    gradient = torch.empty(mixed.shape, dtype=mixed.dtype, device=mixed.device)
    q, k, v = split_projection(mixed)
    dq, dk, dv = split_projection(gradient)
    do, out = (x.permute(1, 2, 0, 3) for x in (do, out))
    sums = None if bias is None else empty_sums(q, dropout=seed is not None)
    extras = Extras(slopes, starts, seed, dropout)
    launch_backward(do, q, k, v, out, lse, first_key, (dq, dk, dv), extras, sums=sums)
    if bias is None or sums is None:
        return gradient, mixed.new_empty(0)
    return gradient, sum_parts(sums.flatten(0, 1), bias.dtype).view(bias.shape)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _new_output(q), *empty_statistics(q)


@attention_backward.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _new_output(q), _new_output(k), _new_output(v)


@fused_attention.register_fake
def _(mixed: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return mixed.new_empty(*mixed.shape[:3], mixed.size(4)), *empty_statistics(split_projection(mixed)[0])


@fused_attention_backward.register_fake
def _(do: Tensor, mixed: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    gradient = torch.empty(mixed.shape, dtype=mixed.dtype, device=mixed.device)
    return gradient, mixed.new_empty(0) if bias is None else torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.dropout = inputs
    ctx.save_for_backward(*tensors[:-3], *output, *tensors[-3:])
    ctx.set_materialize_grads(False)


def _separate_gradients(ctx: Any, do: Tensor | None, *unused: Any) -> Gradients:
    if do is None:
        return (None,) * 7
    return *attention_backward(do, *ctx.saved_tensors, ctx.dropout), None, None, None, None


def _fused_gradient(ctx: Any, do: Tensor | None, *unused: Any) -> Gradients:
    if do is None:
        return (None,) * 6
    mixed, bias, *rest = ctx.saved_tensors
    gradient, bias_gradient = fused_attention_backward(do, mixed, bias, *rest, ctx.dropout)
    return gradient, None if bias is None else bias_gradient, None, None, None, None


attention.register_autograd(_separate_gradients, setup_context=_keep)
fused_attention.register_autograd(_fused_gradient, setup_context=_keep)

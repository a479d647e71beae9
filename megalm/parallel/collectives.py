"""Collectives with gradients, over a `Group`: the two halves of tensor parallelism and of sequence parallelism.

Each function is the identity on a group of one. Tensor parallelism cuts the last dimension (features), sequence
parallelism the first (positions). Every pair below is adjoint: one's backward is the other's forward.

    forward          backward
    copy_to          identity        all-reduce
    reduce_from      all-reduce      identity
    scatter_to       keep a part     all-gather        of the last dimension
    gather_from      all-gather      keep a part       of the last dimension
    scatter_sequence keep a part     all-gather        of the first dimension
    gather_sequence  all-gather      reduce-scatter    of the first dimension
    reduce_scatter_sequence
                     reduce-scatter  all-gather        of the first dimension
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.parallel.shard import shard_size
from megalm.topology.group import Group

# torch 2.13 renames both and warns about the old names, the only ones before it.
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def copy_to(x: Tensor, group: Group) -> Tensor:
    """Enter a tensor-parallel region: the same tensor on every rank, its gradients summed."""
    return x if group.size == 1 else _CopyTo.apply(x, group)


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """Leave a tensor-parallel region: the sum of every rank's tensor."""
    return x if group.size == 1 else _ReduceFrom.apply(x, group)


def scatter_to(x: Tensor, group: Group) -> Tensor:
    """This rank's part of the last dimension of a tensor that every rank holds."""
    return x if group.size == 1 else _ScatterTo.apply(x, group)


def gather_from(x: Tensor, group: Group) -> Tensor:
    """The whole last dimension, of which every rank holds a part. Every rank must use the result in the same way."""
    return x if group.size == 1 else _GatherFrom.apply(x, group)


def scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """This rank's part of the positions of a tensor that every rank holds."""
    return x if group.size == 1 else _ScatterSequence.apply(x, group)


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """All positions, of which every rank holds a part, entering a tensor-parallel region."""
    return x if group.size == 1 else _GatherSequence.apply(x, group)


def reduce_scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """This rank's positions of the sum of every rank's tensor, leaving a tensor-parallel region."""
    return x if group.size == 1 else _ReduceScatterSequence.apply(x, group)


def start_gather_sequence(x: Tensor, group: Group) -> tuple[Tensor, Any]:
    """Begin to gather all positions; the tensor is whole once the second value's `wait` returns. Has no gradient."""
    whole = x.new_empty((x.size(0) * group.size, *x.shape[1:]))
    return whole, all_gather_into(whole, x.contiguous(), group=group.handle, async_op=True)


def start_reduce_scatter_sequence(x: Tensor, group: Group) -> tuple[Tensor, Any]:
    """Begin to sum over the group and keep this rank's positions, as `start_gather_sequence` does. Has no gradient."""
    part = x.new_empty((shard_size(x.size(0), group, what="sequence length"), *x.shape[1:]))
    return part, reduce_scatter_into(part, x.contiguous(), group=group.handle, async_op=True)


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    # A copy: the argument may be shared with another node of the graph.
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group.handle)
    return total


def _all_gather_first(x: Tensor, group: Group) -> Tensor:
    whole, gathering = start_gather_sequence(x, group)
    gathering.wait()
    return whole


def _reduce_scatter_first(x: Tensor, group: Group) -> Tensor:
    part, reducing = start_reduce_scatter_sequence(x, group)
    reducing.wait()
    return part


def _keep_first(x: Tensor, group: Group) -> Tensor:
    size = shard_size(x.size(0), group, what="sequence length")
    return x.narrow(0, group.rank * size, size).contiguous()


def _all_gather_last(x: Tensor, group: Group) -> Tensor:
    parts = _all_gather_first(x.unsqueeze(0), group)  # [t, ..., h/t]
    return torch.cat(parts.unbind(0), dim=-1)  # -> [..., h]


def _keep_last(x: Tensor, group: Group) -> Tensor:
    size = shard_size(x.size(-1), group, what="last dimension")
    return x.narrow(-1, group.rank * size, size).contiguous()


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grads[0], ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _keep_last(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_gather_last(grads[0], ctx.group), None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_gather_last(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _keep_last(grads[0], ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _keep_first(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_gather_first(grads[0], ctx.group), None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_gather_first(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter_first(grads[0], ctx.group), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduce_scatter_first(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_gather_first(grads[0], ctx.group), None

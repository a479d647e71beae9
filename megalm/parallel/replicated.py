"""Whole gradients for replicated parameters that see only a part of the sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.topology.group import Group


def sum_gradient_over(group: Group, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The parameters unchanged, with their gradients summed over `group`.

    Under sequence parallelism a LayerNorm or a row-parallel bias is applied to [s/t, b, h] on each rank, so its local
    gradient is a partial sum. Summing inside autograd gives every engine the whole gradient, with no hook to forget.

    Communicates: one all-reduce of all the gradients together, in fp32, over `group` in backward.
    """
    if group.size == 1:
        return parameters
    summed: tuple[Tensor, ...] = _SumGradient.apply(group, *parameters)
    return summed


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat = torch.cat([grad.reshape(-1).float() for grad in grads])
        dist.all_reduce(flat, group=ctx.group.handle)
        parts = flat.split([grad.numel() for grad in grads])
        return (None, *(part.view_as(grad).to(grad.dtype) for part, grad in zip(parts, grads, strict=True)))

"""Gradients that whoever computes them adds to the parameter's fp32 sum, without a gradient of the parameter's size.

A linear layer's matrix product adds to the sum as it ends. A vocabulary's table, the largest parameter of a model of a
few billion, has a gradient of two parts, of the lookup and of the head, which autograd would write out, add up and hand
on; here both go straight into the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.kernels.gradient_sum.protocol import GradientSumKernel


@dataclass(frozen=True)
class GradientSum:
    """Where the gradients of one parameter add up over the micro-batches of a step: `total`, in fp32, of its shape."""

    total: Tensor
    kernel: GradientSumKernel

    def add(self, gradient: Tensor, *, factor: Tensor | None = None) -> None:
        """Add factor * gradient."""
        self.kernel.add_(self.total, gradient, factor=factor)

    def add_rows(self, ids: Tensor, rows: Tensor) -> None:
        """Add each row to that of its id; negative ids are left out. Shapes: ids [...], rows [..., h]."""
        self.kernel.add_rows_(self.total, ids.reshape(-1), rows.reshape(-1, rows.size(-1)))


def mark_adding(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter whose users add to its `GradientSum` by themselves, once an engine gives it one."""
    parameter.adds_gradients = True  # type: ignore[attr-defined]
    return parameter


def adds_gradients(parameter: nn.Parameter) -> bool:
    """Whether `mark_adding` was called."""
    return bool(getattr(parameter, "adds_gradients", False))


def give_gradient_sum(parameter: nn.Parameter, gradient_sum: GradientSum) -> None:
    """From now on users of `parameter` that can add to this; what others hand to autograd is the engine's to add."""
    assert gradient_sum.total.shape == parameter.shape, (gradient_sum.total.shape, parameter.shape)
    parameter.gradient_sum = gradient_sum  # type: ignore[attr-defined]


def gradient_sum_of(weight: Tensor) -> GradientSum | None:
    """The sum of a parameter, or of the parameter that `weight` is a view of; None where autograd does it."""
    owner = weight if weight._base is None else weight._base
    found: GradientSum | None = getattr(owner, "gradient_sum", None)
    return found


def lookup(ids: Tensor, weight: Tensor, *, present: Tensor | None = None) -> Tensor:
    """Rows of `weight`; without a `GradientSum`, F.embedding. Rows that are not `present` have no gradient.

    Shapes: ids, present [...], weight [v, h] -> [..., h].
    """
    if not torch.is_grad_enabled() or (total := gradient_sum_of(weight)) is None:
        return F.embedding(ids, weight)
    rows: Tensor = _Lookup.apply(weight, ids, ids if present is None else ids.masked_fill(~present, -1), total)
    return rows


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, own: Tensor, total: GradientSum) -> Tensor:
        ctx.total = total
        ctx.save_for_backward(own)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        ctx.total.add_rows(*ctx.saved_tensors, gradients[0])
        return None, None, None, None

"""Linear layers whose weight is cut over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.kernels.bias_gelu.protocol import BiasGeluKernel
from megalm.kernels.gelu_linear.operations import gelu_linear, gelu_linear_backward
from megalm.kernels.linear.protocol import LinearKernel
from megalm.kernels.linear.torch_native import TorchLinear, add_weight_gradient, linear_backward
from megalm.parallel.collectives import (
    gather_from,
    reduce_from,
    reduce_scatter_sequence,
    start_gather_sequence,
    start_reduce_scatter_sequence,
)
from megalm.parallel.gradient_sum import GradientSum, mark_adding
from megalm.parallel.replicated import sum_gradient_over
from megalm.parallel.shard import mark_replicated, mark_sharded, shard_size
from megalm.topology.group import SOLO, Group

TORCH = TorchLinear()


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    kernel: LinearKernel = TORCH,
    tp: Group = SOLO,
    sequence_parallel: bool = False,
) -> Tensor:
    """x W^T + b, entering a tensor-parallel region if `tp` has several ranks: the same x on each, its gradients summed.

    The weight's gradient goes to its `GradientSum`, if it has one; autograd then gets none.

    Shapes: x [s, b, in] ([s/t, b, in] with sequence_parallel), weight [out, in], bias [out] -> [s, b, out].
    Communicates: an all-reduce of x's gradient; with sequence_parallel, an all-gather of x in forward and again in
        backward, and a reduce-scatter of its gradient. What backward sends travels while it multiplies.
    """
    found: GradientSum | None = getattr(weight, "gradient_sum", None) if torch.is_grad_enabled() else None
    y: Tensor
    if tp.size > 1 or kernel.name != TORCH.name:
        y = _Linear.apply(x, weight, bias, kernel, tp, sequence_parallel and tp.size > 1, found)
    elif found is not None:
        y = _AddingLinear.apply(x, weight, bias, found.total)
    else:
        y = F.linear(x, weight, bias)
    return y


class _AddingLinear(torch.autograd.Function):
    """F.linear that adds its weight's gradient to a sum. Of tensors alone, so that torch.compile looks into it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, total)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, total = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_x, grad_weight = None, None
        if wants_x and wants_weight:
            grad_x = linear_backward(total, grad, x, weight)
        elif wants_x:
            grad_x = grad @ weight
        elif wants_weight:  # A graph would leave out an operation without a result; the engine adds this one.
            grad_weight = TORCH.weight_gradient(grad, x)
        return grad_x, grad_weight, grad.flatten(0, -2).sum(0) if wants_bias else None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kernel: LinearKernel,
        tp: Group,
        sequence_parallel: bool,
        total: GradientSum | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kernel, ctx.tp, ctx.sequence_parallel, ctx.total = kernel, tp, sequence_parallel, total
        if sequence_parallel:
            whole, gathering = start_gather_sequence(x, tp)
            gathering.wait()
            return kernel.output(whole, weight, bias)
        return kernel.output(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        # Kept is this rank's part of the sequence; the whole is gathered while x's gradient is computed.
        gathering = None
        if ctx.sequence_parallel and wants_weight:
            x, gathering = start_gather_sequence(x, ctx.tp)
        grad_x, reducing = None, None
        if wants_x:
            grad_x = ctx.kernel.input_gradient(grad, weight)
            # The sum over tp travels while the weight's gradient is computed.
            if ctx.sequence_parallel:
                grad_x, reducing = start_reduce_scatter_sequence(grad_x, ctx.tp)
            elif ctx.tp.size > 1:
                grad_x = grad_x.contiguous()
                reducing = dist.all_reduce(grad_x, group=ctx.tp.handle, async_op=True)
        if gathering is not None:
            gathering.wait()
        grad_weight = _weight_gradient(ctx.kernel, ctx.total, grad, x) if wants_weight else None
        grad_bias = grad.flatten(0, -2).sum(0) if wants_bias else None
        if reducing is not None:
            reducing.wait()
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _weight_gradient(kernel: LinearKernel, total: GradientSum | None, grad: Tensor, x: Tensor) -> Tensor | None:
    """The weight's gradient, or None if it was added to `total`."""
    if total is None:
        return kernel.weight_gradient(grad, x)
    if kernel.name == TORCH.name:
        add_weight_gradient(total.total, grad, x)
    else:
        total.add(kernel.weight_gradient(grad, x))
    return None


def activated_linear(
    activation: BiasGeluKernel, x: Tensor, bias: Tensor, weight: Tensor, *, kernel: LinearKernel = TORCH
) -> Tensor:
    """`linear` of activation(x, bias), without a bias of its own; backward keeps x and computes the activation again.

    Shapes: x [..., in] (a gated activation's [..., 2 in]), bias as x's last dimension, weight [out, in] -> [..., out].
    """
    found: GradientSum | None = getattr(weight, "gradient_sum", None)
    y: Tensor = _ActivatedLinear.apply(x, bias, weight, activation, kernel, found)
    return y


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor,
        weight: Tensor,
        activation: BiasGeluKernel,
        kernel: LinearKernel,
        total: GradientSum | None,
    ) -> Tensor:
        ctx.save_for_backward(x, bias, weight)
        ctx.activation, ctx.kernel, ctx.total = activation, kernel, total
        return kernel.output(activation(x, bias), weight, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        *inputs, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        inputs = [value.detach().requires_grad_(wants) for value, wants in zip(inputs, wanted, strict=True)]
        with torch.enable_grad():
            activated = ctx.activation(*inputs)
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = _weight_gradient(ctx.kernel, ctx.total, grad, activated.detach())
        differentiated = [value for value in inputs if value.requires_grad]
        found: list[Tensor] = []
        if differentiated:
            gradient = ctx.kernel.input_gradient(grad, weight)
            found = list(torch.autograd.grad(activated, differentiated, gradient))
        given = [found.pop(0) if wants else None for wants in wanted]
        return *given, grad_weight, None, None, None


def gelu_mlp(x: Tensor, up: Tensor, bias: Tensor, down: Tensor, *, kernel: str) -> Tensor:
    """`linear` of gelu(x W^T + bias) on one tensor-parallel rank, the GELU inside the products; no bias comes after.

    Weights' gradients go to their `GradientSum`s, if they have them. `kernel` names a `GeluLinearKernel`.

    Shapes: x [..., in], up (W) [f, in], bias [f], down [out, f] -> [..., out].
    """
    totals: list[Tensor | None] = [None, None]
    if torch.is_grad_enabled():
        sums = (getattr(weight, "gradient_sum", None) for weight in (up, down))
        totals = [None if found is None else found.total for found in sums]
    y: Tensor = _GeluMlp.apply(x, up, bias, down, *totals, kernel)
    return y


class _GeluMlp(torch.autograd.Function):
    """Of tensors and a name alone, so that torch.compile looks into it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor,
        bias: Tensor,
        down: Tensor,
        up_total: Tensor | None,
        down_total: Tensor | None,
        kernel: str,
    ) -> Tensor:
        activated, inner = gelu_linear(x, up, bias, kernel=kernel)
        ctx.kernel = kernel
        ctx.save_for_backward(x, up, down, up_total, down_total, activated, inner)
        return F.linear(activated, down)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, up, down, up_total, down_total, activated, inner = ctx.saved_tensors
        wants_x, wants_up, _, wants_down = ctx.needs_input_grad[:4]
        grad_down = TORCH.weight_gradient(grad, activated) if wants_down and down_total is None else None
        total = down_total if wants_down else None
        wide, grad_bias = gelu_linear_backward(total, grad, down, inner, activated, kernel=ctx.kernel)
        grad_x, grad_up = None, None
        if wants_x and wants_up and up_total is not None:
            grad_x = linear_backward(up_total, wide, x, up)
        else:
            grad_x = wide @ up if wants_x else None
            grad_up = TORCH.weight_gradient(wide, x) if wants_up else None
        return grad_x, grad_up, grad_bias, grad_down, None, None, None


class ColumnParallelLinear(nn.Module):
    """y = x A^T + b with A's output features cut over `tp`; with a group of one, nn.Linear.

    The constructor allocates; `parallel.initialise` fills. With `skip_bias_add` the caller adds `added_bias()` itself,
    fused with what follows.

    Shapes: x [s, b, in] ([s/t, b, in] with sequence_parallel) -> [s, b, out/t] ([s, b, out] with gather_output).
    Communicates: as `linear`.
    Raises: ConfigError if tp.size does not divide out_size.
    Source: Shoeybi et al. 2019, arXiv:1909.08053; sequence parallelism: Korthikanti et al. 2022, arXiv:2205.05198.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        tp: Group,
        bias: bool = True,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        skip_bias_add: bool = False,
        kernel: LinearKernel = TORCH,
    ) -> None:
        super().__init__()
        local = shard_size(out_size, tp, what="out_size of a column-parallel layer")
        self.tp = tp
        self.gather_output = gather_output
        self.sequence_parallel = sequence_parallel
        self.skip_bias_add = skip_bias_add
        self.kernel = kernel
        self.weight = mark_adding(mark_sharded(nn.Parameter(torch.empty(local, in_size)), dim=0))
        self.bias = mark_sharded(nn.Parameter(torch.empty(local)), dim=0) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.with_bias(x, None if self.skip_bias_add else self.bias)

    def with_bias(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with another bias [out/t] than its own, or with its own without a history."""
        y = linear(x, self.weight, bias, kernel=self.kernel, tp=self.tp, sequence_parallel=self.sequence_parallel)
        # [s, b, in] -> [s, b, out/t]
        return gather_from(y, self.tp) if self.gather_output else y

    def added_bias(self) -> Tensor:
        """The bias [out/t] that a caller adds after `skip_bias_add`, or whose gradient it knows already."""
        assert self.bias is not None, "the layer was made with bias=False"
        return self.bias


class RowParallelLinear(nn.Module):
    """y = x A^T + b with A's input features cut over `tp`; with a group of one, nn.Linear.

    The bias is replicated and added once, after the sum. With `skip_bias_add` the caller adds `added_bias()` itself.

    Shapes: x [s, b, in/t] -> [s, b, out] ([s/t, b, out] with sequence_parallel).
    Communicates: an all-reduce of the output over tp; with sequence_parallel, a reduce-scatter of the output, an
        all-gather of its gradient and an all-reduce of the bias's gradient.
    Raises: ConfigError if tp.size does not divide in_size.
    Source: Shoeybi et al. 2019, arXiv:1909.08053; sequence parallelism: Korthikanti et al. 2022, arXiv:2205.05198.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        tp: Group,
        bias: bool = True,
        sequence_parallel: bool = False,
        skip_bias_add: bool = False,
        kernel: LinearKernel = TORCH,
    ) -> None:
        super().__init__()
        local = shard_size(in_size, tp, what="in_size of a row-parallel layer")
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        self.skip_bias_add = skip_bias_add
        self.kernel = kernel
        self.weight = mark_adding(mark_sharded(nn.Parameter(torch.empty(out_size, local)), dim=1))
        self.bias = mark_replicated(nn.Parameter(torch.empty(out_size))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self._summed(linear(x, self.weight, None, kernel=self.kernel))

    def after_activation(self, activation: BiasGeluKernel, x: Tensor, bias: Tensor) -> Tensor:
        """The layer of activation(x, bias), whose result backward computes again in place of keeping it."""
        return self._summed(activated_linear(activation, x, bias, self.weight, kernel=self.kernel))

    def _summed(self, y: Tensor) -> Tensor:  # partial sums [s, b, out]
        y = reduce_scatter_sequence(y, self.tp) if self.sequence_parallel else reduce_from(y, self.tp)
        return y if self.skip_bias_add or self.bias is None else y + self.added_bias()

    def added_bias(self) -> Tensor:
        """The bias [out] that a caller adds after `skip_bias_add`; its gradient is whole in either mode."""
        assert self.bias is not None, "the layer was made with bias=False"
        return sum_gradient_over(self.tp, self.bias)[0] if self.sequence_parallel else self.bias

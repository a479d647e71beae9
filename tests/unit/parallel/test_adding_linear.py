"""Linear layers that add their weights' gradients to fp32 sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megalm.kernels.gradient_sum.oracle import TorchGradientSum
from megalm.kernels.linear.fp8 import Fp8Linear
from megalm.kernels.linear.protocol import LinearKernel
from megalm.parallel.gradient_sum import GradientSum, give_gradient_sum
from megalm.parallel.linear import TORCH, ColumnParallelLinear, RowParallelLinear
from megalm.topology.group import SOLO


class Two(nn.Module):
    """A column- and a row-parallel layer, with one function between them."""

    def __init__(self, kernel: LinearKernel = TORCH) -> None:
        super().__init__()
        self.wide = ColumnParallelLinear(16, 48, tp=SOLO, kernel=kernel)
        self.narrow = RowParallelLinear(48, 16, tp=SOLO, kernel=kernel)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.narrow(self.wide(x).tanh())
        return result


def _inputs(count: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 2, 16, generator=generator).to(dtype).requires_grad_() for _ in range(count)]


def _with_sums(module: Two) -> list[Tensor]:
    """Sums of the matrices, views of one buffer, as an engine's are."""
    weights = [module.wide.weight, module.narrow.weight]
    flat = torch.zeros(sum(weight.numel() for weight in weights))
    sums = []
    for weight, part in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        sums.append(part.data.view(weight.shape))
        give_gradient_sum(weight, GradientSum(sums[-1], TorchGradientSum()))
    return sums


@pytest.mark.parametrize(
    ("kernel", "backend"),
    [(TORCH, None), (TORCH, "aot_eager"), (Fp8Linear(), None)],  # other products than torch's stay out of graphs
    ids=["torch", "torch-compiled", "fp8"],
)
def test_sums_hold_what_autograd_would_give(kernel: LinearKernel, backend: str | None) -> None:
    torch._dynamo.reset()
    theirs, ours = Two(kernel).bfloat16(), Two(kernel).bfloat16()
    sums = _with_sums(ours)
    if backend is not None:
        ours._compute = torch.compile(ours._compute, dynamic=False, fullgraph=True, backend=backend)  # type: ignore[method-assign]
    wanted = [torch.zeros_like(total) for total in sums]
    inputs, again = _inputs(2, torch.bfloat16), _inputs(2, torch.bfloat16)
    for x in inputs:
        theirs(x).float().square().mean().backward()
        for total, weight in zip(wanted, (theirs.wide.weight, theirs.narrow.weight), strict=True):
            assert weight.grad is not None
            total.add_(weight.grad)
            weight.grad = None
    # As pipelines do: both forward passes before the first backward.
    for loss in [ours(x).float().square().mean() for x in again]:
        loss.backward()
    for total, expected in zip(sums, wanted, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(total, expected, rtol=0, atol=0)
    for x, y in zip(inputs, again, strict=True):
        torch.testing.assert_close(y.grad, x.grad, rtol=0, atol=0)
    for name, parameter in ours.named_parameters():
        matches = dict(theirs.named_parameters())[name]
        assert (parameter.grad is None) == (parameter.dim() == 2), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, matches.grad, rtol=0, atol=0)


def test_layers_of_the_same_shape_share_a_graph() -> None:
    torch._dynamo.reset()
    from torch._dynamo.utils import counters

    counters.clear()
    layers = [Two().bfloat16() for _ in range(3)]
    sums = [_with_sums(layer) for layer in layers]
    x = _inputs(1, torch.bfloat16)[0]
    y = x
    for layer in layers:
        layer._compute = torch.compile(layer._compute, dynamic=False, fullgraph=True, backend="aot_eager")  # type: ignore[method-assign]
        y = layer(y)
    y.float().square().mean().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert all(total.abs().max() > 0 for pair in sums for total in pair)
    assert not torch.equal(sums[0][0], sums[1][0])


def test_an_evaluation_adds_nothing() -> None:
    layer = Two().bfloat16()
    sums = _with_sums(layer)
    with torch.no_grad():
        layer(_inputs(1, torch.bfloat16)[0])
    assert all(total.abs().max() == 0 for total in sums)


def test_a_frozen_weight_gets_nothing() -> None:
    layer = Two().bfloat16()
    sums = _with_sums(layer)
    layer.wide.weight.requires_grad_(False)
    layer(_inputs(1, torch.bfloat16)[0]).float().square().mean().backward()
    assert sums[0].abs().max() == 0
    assert sums[1].abs().max() > 0


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_the_gradient_of_a_first_layer_is_left_to_autograd(backend: str | None) -> None:
    torch._dynamo.reset()
    layer = Two().bfloat16()
    sums = _with_sums(layer)
    if backend is not None:
        layer._compute = torch.compile(layer._compute, dynamic=False, fullgraph=True, backend=backend)  # type: ignore[method-assign]
    layer(_inputs(1, torch.bfloat16)[0].detach()).float().square().mean().backward()
    assert layer.wide.weight.grad is not None
    assert layer.wide.weight.grad.abs().max() > 0
    assert sums[0].abs().max() == 0
    assert sums[1].abs().max() > 0
    assert layer.narrow.weight.grad is None

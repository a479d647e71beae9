"""A linear layer after an activation function whose result is computed again in backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megalm.kernels.bias_gelu.eager import bias_gelu
from megalm.kernels.bias_gelu.gated import torch_glu
from megalm.kernels.bias_gelu.jit import bias_gelu_jit
from megalm.kernels.gradient_sum.oracle import TorchGradientSum
from megalm.kernels.linear.fp8 import Fp8Linear
from megalm.kernels.linear.protocol import LinearKernel
from megalm.models.blocks.arrangement import Spread
from megalm.models.gpt.build import build_model, plan_gpt
from megalm.parallel.gradient_sum import GradientSum, give_gradient_sum
from megalm.parallel.linear import TORCH, RowParallelLinear
from megalm.topology.group import SOLO
from tests.unit.models import small

TOKENS, WIDE, NARROW = 16, 32, 48


def _operands(dtype: torch.dtype, *, gated: bool) -> tuple[Tensor, Tensor, RowParallelLinear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = 2 * WIDE if gated else WIDE
    shapes = ((TOKENS, 1, inputs), (inputs,), (NARROW, WIDE), (TOKENS, 1, NARROW))
    x, bias, weight, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    layer = RowParallelLinear(WIDE, NARROW, tp=SOLO, bias=False).to(dtype)
    layer.weight.data.copy_(weight)
    return x.requires_grad_(), bias.requires_grad_(), layer, grad


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("kernel", [TORCH, Fp8Linear()], ids=["torch", "fp8"])
@pytest.mark.parametrize(
    ("activation", "gated"), [(bias_gelu, False), (bias_gelu_jit, False), (torch_glu("swiglu"), True)]
)
def test_gradients_are_those_of_both_one_after_the_other(
    activation: Callable[[Tensor, Tensor], Tensor], gated: bool, kernel: LinearKernel, sums: bool
) -> None:
    results = []
    for recomputes in (False, True):
        x, bias, layer, grad = _operands(torch.bfloat16, gated=gated)
        layer.kernel = kernel
        total = torch.zeros(NARROW, WIDE)
        if sums:
            give_gradient_sum(layer.weight, GradientSum(total, TorchGradientSum()))
        y = layer.after_activation(activation, x, bias) if recomputes else layer(activation(x, bias))
        y.backward(grad)
        assert (layer.weight.grad is None) == sums
        results.append((y.detach(), x.grad, bias.grad, total if sums else layer.weight.grad))
    assert results[0][3].abs().max() > 0
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


@pytest.mark.parametrize("frozen", ["x", "bias", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    x, bias, layer, grad = _operands(torch.float32, gated=False)
    leaves = {"x": x, "bias": bias, "weight": layer.weight}
    leaves[frozen].requires_grad_(False)
    layer.after_activation(bias_gelu, x, bias).backward(grad)
    assert {name for name, leaf in leaves.items() if leaf.grad is None} == {frozen}


def test_a_block_keeps_a_quarter_of_its_activations_less() -> None:
    kept = {}
    for recompute in ("none", "activation"):
        model = small.bloom(num_layers=2, hidden_size=64, num_heads=4)
        module = build_model(plan_gpt(model, spread=Spread(recompute=recompute)), seed=0)
        sizes: dict[tuple[int, int], int] = {}

        def keep(tensor: Tensor, sizes: dict[tuple[int, int], int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr(), tensor.numel()] = tensor.numel()
            return tensor

        parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        tokens = torch.randint(0, 96, (2, 33), generator=torch.Generator().manual_seed(1))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = module(tokens[:, :-1], tokens[:, 1:])
        kept[recompute] = sum(size for (place, _), size in sizes.items() if place not in parameters)
        loss.backward()
    # 64 tokens, two blocks, four times the hidden size for each.
    assert kept["none"] - kept["activation"] == 64 * 2 * 4 * 64

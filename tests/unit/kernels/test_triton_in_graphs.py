"""The Triton kernels as torch operations: one graph under torch.compile, and checked registrations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.kernels.bias_gelu.triton_activation import TritonGlu, bias_gelu
from megalm.kernels.dropout_add.triton_dropout import bias_dropout_add
from megalm.kernels.layer_norm.triton_norm import add_layer_norm, layer_norm_and_pass
from megalm.kernels.rotary.triton_rotary import rotary
from megalm.kernels.softmax.triton_softmax import scale_mask_softmax


def block(x: Tensor, bias: Tensor, weight: Tensor, wide: Tensor) -> Tensor:
    """Every operation that a block may call, one after the other."""
    normed, x = layer_norm_and_pass(x, weight, bias, 1e-5)
    total, again = add_layer_norm(normed, bias, x, weight, bias, 1e-5)
    heads = rotary(again.view(1, 2, 4, 8), torch.ones(4, 4, device=x.device))
    scores = scale_mask_softmax(heads @ heads.transpose(2, 3), None, scale=0.3)
    activated = bias_gelu(torch.cat((again, again), dim=-1), wide)
    gated = TritonGlu("swiglu")(activated, wide)
    return bias_dropout_add(gated, bias, total, 0.0, True) + scores.sum()


@pytest.mark.slow
def test_a_function_of_all_kernels_is_one_graph_with_the_same_gradients(
    triton_device: torch.device, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("--full loads torch.compile, which takes seconds")
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 8), (8,), (8,), (16,))
    values = [torch.randn(*shape, generator=generator).to(triton_device) for shape in shapes]
    results = []
    for function in (block, torch.compile(block, fullgraph=True, dynamic=False, backend="aot_eager")):
        leaves = [value.clone().requires_grad_() for value in values]
        result = function(*leaves)
        result.square().sum().backward()
        results.append([result.detach(), *(leaf.grad for leaf in leaves)])
    # The same kernels; autograd may add two gradients of x in another order.
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-5)


OPERATIONS: dict[str, tuple[Any, ...]] = {
    "layer_norm": (torch.ones(3, 8), torch.ones(3, 8), torch.ones(8), torch.ones(8), torch.ones(8), 1e-5),
    "layer_norm_backward": (
        torch.ones(3, 8), None, torch.ones(3, 8), torch.ones(8), torch.ones(3), torch.ones(3), False
    ),
    "bias_activation": (torch.ones(3, 8), torch.ones(8), "swiglu"),
    "bias_activation_backward": (torch.ones(3, 4), torch.ones(3, 8), torch.ones(8), "swiglu"),
    "bias_dropout_add": (torch.ones(3, 8), torch.ones(8), torch.ones(3, 8), torch.zeros(1, dtype=torch.int64), 0.1),
    "bias_dropout_add_backward": (torch.ones(3, 8), torch.zeros(1, dtype=torch.int64), 0.1),
    "scale_mask_softmax": (torch.ones(2, 2, 3, 5), torch.zeros(3, 5, dtype=torch.bool), 0.5),
    "scale_mask_softmax_backward": (torch.ones(2, 2, 3, 5), torch.ones(2, 2, 3, 5), 0.5),
    "rotary": (torch.ones(1, 2, 3, 8), torch.ones(3, 4), 1.0),
    "row_statistics": (torch.ones(3, 8),),
    "row_exponentials_": (torch.ones(3, 8), torch.zeros(3, dtype=torch.int64), torch.ones(3), 0.0),
    "row_gradient_": (
        torch.ones(3, 8), torch.zeros(3, dtype=torch.int64), torch.zeros(3), torch.ones(3), 0.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_says_what_it_changes_and_what_it_returns(name: str, triton_device: torch.device) -> None:
    import megalm.kernels.cross_entropy.triton_rows  # noqa: F401  registers the last two

    arguments = tuple(
        value.to(triton_device, copy=True) if isinstance(value, Tensor) else value for value in OPERATIONS[name]
    )
    operation = getattr(torch.ops.megalm, name).default
    torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))

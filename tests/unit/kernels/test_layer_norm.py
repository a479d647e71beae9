"""LayerNorm: the oracle against float64, torch's kernel against the oracle's promise."""

from __future__ import annotations

import pytest
import torch

from megalm.kernels.layer_norm import oracle, torch_native
from megalm.kernels.layer_norm.module import MixedFusedLayerNorm
from megalm.kernels.layer_norm.protocol import LayerNormKernel

IMPLEMENTATIONS = [
    pytest.param(oracle.layer_norm, id="reference"),
    pytest.param(torch_native.layer_norm, id="torch"),
]


def example(dtype: torch.dtype, weight_dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(64, 4, 96, generator=generator) + 3
    weight = 1 + 0.3 * torch.randn(96, generator=generator)
    bias = 0.3 * torch.randn(96, generator=generator)
    return [t.to(d).requires_grad_() for t, d in ((x, dtype), (weight, weight_dtype), (bias, weight_dtype))]


def exact_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x * x).mean(-1, keepdim=True) - mean * mean
    return (x - mean) / (variance + eps) ** 0.5 * weight + bias


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "dtype, weight_dtype",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_layer_norm_rounds_once_forward_and_backward(
    implementation: LayerNormKernel, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    ours = example(dtype, weight_dtype)
    exact = [t.detach().double().requires_grad_() for t in ours]
    result = implementation(*ours, 1e-5)
    expected = exact_layer_norm(*exact, 1e-5)
    incoming = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    result.backward(incoming)
    expected.backward(incoming.double())

    assert result.dtype == dtype
    assert_rounded_once(result, expected, dtype)
    assert_rounded_once(ours[0].grad, exact[0].grad, dtype)
    for parameter, reference in zip(ours[1:], exact[1:], strict=True):
        assert parameter.grad.dtype == weight_dtype
        # Sums of 256 terms of either sign: their fp32 rounding is 256 times that of one term, at worst.
        bound = 0.5 * torch.finfo(weight_dtype).eps * reference.grad.abs() + 256 * 1e-6
        assert ((parameter.grad.double() - reference.grad).abs() <= bound).all()


def assert_rounded_once(result: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    # Half an epsilon for the rounding; 4e-6 for fp32 arithmetic on normalised values below 8 in rows of 96.
    bound = 0.5 * torch.finfo(dtype).eps * expected.abs() + 4e-6
    assert ((result.double() - expected).abs() <= bound).all()


def test_oracle_keeps_float64_for_derivative_checks() -> None:
    x, weight, bias = (t.detach().double().requires_grad_() for t in example(torch.float32, torch.float32))
    assert torch.autograd.gradcheck(lambda *t: oracle.layer_norm(*t, 1e-5), (x[:2, :1, :8], weight[:8], bias[:8]))


def test_module_starts_as_plain_normalisation_and_calls_what_it_was_given() -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    module = MixedFusedLayerNorm(16, eps=1e-3)
    assert torch.equal(module(x), oracle.layer_norm(x, torch.ones(16), torch.zeros(16), 1e-3))

    def doubled(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        return 2 * x

    assert torch.equal(MixedFusedLayerNorm(16, implementation=doubled)(x), 2 * x)
    assert list(module.state_dict()) == ["weight", "bias"]

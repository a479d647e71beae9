"""GELU in all its forms against float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megalm.kernels.bias_gelu import eager, jit
from megalm.kernels.bias_gelu.gelu import BloomGelu, bloom_gelu_back, bloom_gelu_forward, new_gelu
from megalm.kernels.bias_gelu.protocol import BiasGeluKernel

FORMS = [pytest.param(eager.bias_gelu, id="torch"), pytest.param(jit.bias_gelu_jit, id="jit")]

# What fp32 arithmetic costs over [-10, 10] to two digits: 4.3e-7 forward and 5.6e-7 backward, most of it where
# 1 - tanh^2 cancels. Torch's own kernels round tanh and erf differently: 1.04e-6 backward, and 1.16e-6 forward for erf.
FORWARD_ERROR, BACKWARD_ERROR = 4.35e-7, 5.65e-7
TORCH_TANH_BACKWARD_ERROR = TORCH_ERF_FORWARD_ERROR = 1.2e-6
# How far tanh's approximation is from the exact GELU.
FORWARD_FROM_ERF, BACKWARD_FROM_ERF = 4.74e-4, 8.7e-4


def exact_tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def exact_erf_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def values_and_slopes(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    value = function(x)
    (slope,) = torch.autograd.grad(value, x, torch.ones_like(value))
    return value.detach(), slope


def test_bounds_hold_for_every_form_in_fp32() -> None:
    x = torch.linspace(-10, 10, 200_001)
    zero = torch.zeros(1)
    exact = values_and_slopes(exact_tanh_gelu, x.double())
    erf = values_and_slopes(exact_erf_gelu, x.double())
    forms: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
        "torch": (lambda x: eager.bias_gelu(x[:, None], zero)[:, 0], TORCH_TANH_BACKWARD_ERROR),
        "jit": (lambda x: jit.bias_gelu_jit(x[:, None], zero)[:, 0], BACKWARD_ERROR),
        "bloom": (BloomGelu(), BACKWARD_ERROR),
        "new": (new_gelu, BACKWARD_ERROR),
    }
    for name, (form, backward_error) in forms.items():
        value, slope = values_and_slopes(form, x)
        assert (value.double() - exact[0]).abs().max() <= FORWARD_ERROR, name
        assert (slope.double() - exact[1]).abs().max() <= backward_error, name
        assert (value.double() - erf[0]).abs().max() <= FORWARD_FROM_ERF, name
        assert (slope.double() - erf[1]).abs().max() <= BACKWARD_FROM_ERF, name


def test_on_a_cpu_torch_s_form_loses_nothing_to_cancellation() -> None:
    x = torch.linspace(-4, 10, 200_001)
    value = eager.bias_gelu(x[:, None], torch.zeros(1))[:, 0].double()
    exact = exact_tanh_gelu(x.double())
    assert (value - exact).abs().max() <= 2.4e-7
    # 1 + tanh(u) would be wrong in the fourth digit at -4.
    assert ((value - exact).abs() <= 1.2e-6 * exact.abs()).all()


def test_erf_form_is_the_exact_gelu() -> None:
    x = torch.linspace(-10, 10, 20_001)
    value, slope = values_and_slopes(lambda x: eager.bias_gelu_erf(x[:, None], torch.zeros(1))[:, 0], x)
    exact = values_and_slopes(exact_erf_gelu, x.double())
    assert (value.double() - exact[0]).abs().max() <= TORCH_ERF_FORWARD_ERROR
    assert (slope.double() - exact[1]).abs().max() <= BACKWARD_ERROR


@pytest.mark.parametrize("form", FORMS)
def test_bf16_errs_by_half_an_ulp_at_most(form: BiasGeluKernel) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.bfloat16)
    x = every[every.abs() <= 10][:, None]
    value, slope = values_and_slopes(lambda x: form(x, torch.zeros(1, dtype=torch.bfloat16)), x)
    for result, exact, arithmetic in zip(
        (value, slope),
        values_and_slopes(exact_tanh_gelu, x.double()),
        (FORWARD_ERROR, TORCH_TANH_BACKWARD_ERROR),
        strict=True,
    ):
        large = exact.abs() >= 2**-8
        ulp = torch.exp2(torch.floor(torch.log2(exact[large].abs())) - 7)
        assert result.dtype == torch.bfloat16
        assert ((result[large].double() - exact[large]).abs() <= 0.5 * ulp + arithmetic).all()


@pytest.mark.parametrize("form", FORMS)
def test_bias_is_added_in_fp32_and_its_gradient_is_summed_in_fp32(form: BiasGeluKernel) -> None:
    num_rows = 16_384
    # 1 + 2^-8 is a tie in bf16 and would round back to 1.
    x = torch.ones(num_rows, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.full((4,), 2.0**-8, dtype=torch.bfloat16, requires_grad=True)
    result = form(x, bias)
    exact, slope = values_and_slopes(exact_tanh_gelu, torch.tensor([1 + 2.0**-8], dtype=torch.float64))
    assert torch.equal(result[0, 0], exact.to(torch.bfloat16).expand(4))
    result.backward(torch.ones_like(result))
    assert bias.grad is not None
    assert bias.grad.dtype == torch.bfloat16
    # Two roundings to bf16, one of a term and one of the sum. A bf16 accumulator would stop at 256.
    torch.testing.assert_close(bias.grad.double(), num_rows * slope.expand(4), rtol=2 * 2**-8, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_bias_gelu_gradients_match_float64(form: BiasGeluKernel) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(6, 3, 20, generator=generator)).requires_grad_()
    bias = torch.randn(20, generator=generator).requires_grad_()
    incoming = torch.randn(6, 3, 20, generator=generator)
    exact_x, exact_bias = (t.detach().double().requires_grad_() for t in (x, bias))
    form(x, bias).backward(incoming)
    exact_tanh_gelu(exact_x + exact_bias).backward(incoming.double())
    # The incoming gradient is below 4, a bias collects 18 terms.
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=0, atol=4 * TORCH_TANH_BACKWARD_ERROR)
    torch.testing.assert_close(bias.grad.double(), exact_bias.grad, rtol=0, atol=18 * 4 * TORCH_TANH_BACKWARD_ERROR)


def test_documented_backward_takes_the_tensor_itself() -> None:
    x = torch.linspace(-4, 4, 81).reshape(9, 9)
    gradient = bloom_gelu_back(torch.full_like(x, 2.0), x)
    _, slope = values_and_slopes(exact_tanh_gelu, x.double())
    assert gradient.shape == x.shape
    torch.testing.assert_close(gradient.double(), 2 * slope, rtol=0, atol=2 * BACKWARD_ERROR)


def test_documented_forward_equals_transformers() -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    x = torch.linspace(-8, 8, 1001)
    # Two fp32 evaluations, each within its bound of the truth.
    torch.testing.assert_close(bloom_gelu_forward(x), bloom.bloom_gelu_forward(x), rtol=0, atol=2 * FORWARD_ERROR)


def test_jit_functions_are_scripted_without_a_warning() -> None:
    jit._script.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jit.scripting_failure() is None
        jit.bias_gelu(torch.zeros(2), torch.ones(3, 2))
    assert isinstance(jit._script(jit._forward)[0], torch.jit.ScriptFunction)


def test_jit_module_computes_the_same_where_scripting_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    x, bias = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), torch.ones(5)
    expected = values_and_slopes(lambda x: jit.bias_gelu_jit(x, bias), x)

    def refuse(function: object) -> None:
        raise RuntimeError("no TorchScript in this torch")

    jit._script.cache_clear()
    monkeypatch.setattr(torch.jit, "script", refuse)
    try:
        assert jit.scripting_failure() == "RuntimeError: no TorchScript in this torch"
        for result, wanted in zip(values_and_slopes(lambda x: jit.bias_gelu_jit(x, bias), x), expected, strict=True):
            # The same operations in the same order; a fused kernel may contract some.
            torch.testing.assert_close(result, wanted, rtol=0, atol=BACKWARD_ERROR)
    finally:
        jit._script.cache_clear()

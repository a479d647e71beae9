"""Bias-GELU and gated activations in Triton against float64, and against their forms in torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megalm.kernels import triton_sums
from megalm.kernels.bias_gelu import triton_activation
from megalm.kernels.bias_gelu.gated import GATES, bias_glu, torch_glu
from megalm.kernels.bias_gelu.triton_activation import TritonGlu, bias_gelu

# What fp32 arithmetic costs over [-10, 10]: 4.3e-7 and 5.6e-7 are the bounds of the TorchScript form, to two digits.
FORWARD_ERROR, BACKWARD_ERROR = 4.35e-7, 5.65e-7


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and strips without large inputs."""
    monkeypatch.setattr(triton_activation, "COLUMNS", 32)


def exact_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(x + bias, approximate="tanh")


def forms() -> list[tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor], int]]:
    gated = [(TritonGlu(gate), torch_glu(gate), 2) for gate in GATES]
    return [(bias_gelu, exact_gelu, 1), *gated]


def _few_programs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Wide tiles spare the interpreter time. On a GPU three stages of them would not fit into shared memory."""
    if device.type == "cpu":
        monkeypatch.setattr(triton_activation, "COLUMNS", 4096)
        monkeypatch.setattr(triton_sums, "COLUMNS", 4096)


def test_gelu_keeps_the_bounds_of_the_specification_in_fp32(
    monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    _few_programs(monkeypatch, triton_device)
    x = torch.linspace(-10, 10, 80_001, device=triton_device)[None].requires_grad_()
    exact = x.detach().double().requires_grad_()
    zero = torch.zeros(80_001, device=triton_device)
    result, expected = bias_gelu(x, zero), exact_gelu(exact, zero.double())
    result.sum().backward()
    expected.sum().backward()
    assert (result.double() - expected).abs().max() <= FORWARD_ERROR
    assert (x.grad.double() - exact.grad).abs().max() <= BACKWARD_ERROR


def test_gelu_in_bf16_errs_by_half_an_ulp_at_most(monkeypatch: pytest.MonkeyPatch, triton_device: torch.device) -> None:
    _few_programs(monkeypatch, triton_device)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[every.abs() <= 10][None].to(triton_device).requires_grad_()
    exact = x.detach().double().requires_grad_()
    zero = torch.zeros(x.size(1), dtype=torch.bfloat16, device=triton_device)
    result, expected = bias_gelu(x, zero), exact_gelu(exact, zero.double())
    result.sum().backward()
    expected.sum().backward()
    for ours, reference, error in ((result, expected, FORWARD_ERROR), (x.grad, exact.grad, BACKWARD_ERROR)):
        large = reference.abs() >= 2**-8
        ulp = torch.exp2(torch.floor(torch.log2(reference[large].abs())) - 7)
        assert ((ours[large].double() - reference[large]).abs() <= 0.5 * ulp + error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 40, 100])
def test_activations_round_once_and_sum_the_bias_gradient_in_fp32(
    size: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    for form, reference, width in forms():
        generator = torch.Generator().manual_seed(0)
        x, bias = (2 * torch.randn(n, width * size, generator=generator) for n in (37, 1))
        ours = [t.to(triton_device, dtype).requires_grad_() for t in (x, bias[0])]
        exact = [t.detach().double().requires_grad_() for t in ours]
        result, expected = form(*ours), reference(*exact)
        incoming = torch.randn(37, size, generator=generator).to(triton_device, dtype)
        result.backward(incoming)
        expected.backward(incoming.double())
        assert result.dtype == dtype
        # Half an epsilon for the one rounding; products of numbers below 16, and 37 of them in the bias gradient.
        eps = torch.finfo(dtype).eps
        for a, b, terms in ((result, expected, 1), (ours[0].grad, exact[0].grad, 1), (ours[1].grad, exact[1].grad, 37)):
            bound = 0.5 * eps * b.abs() + 16 * BACKWARD_ERROR * terms
            assert ((a.double() - b).abs() <= bound).all(), form


def test_bias_gradient_of_many_rows_does_not_stop_growing(
    monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    if triton_device.type == "cpu":  # Four columns leave room for many rows in a tile.
        monkeypatch.setattr(triton_activation, "COLUMNS", 4)
        monkeypatch.setattr(triton_activation, "FORWARD_COLUMNS", 4)
        monkeypatch.setattr(triton_activation, "FORWARD_ROWS", 256)
    x = torch.full((3000, 4), 8.0, dtype=torch.bfloat16, device=triton_device).requires_grad_()
    bias = torch.zeros(4, dtype=torch.bfloat16, device=triton_device).requires_grad_()
    bias_gelu(x, bias).sum().backward()
    # A bf16 accumulator would stop at 256. 3,000 is 2,992 or 3,008 in bf16.
    torch.testing.assert_close(bias.grad.float().cpu(), torch.full((4,), 3000.0), rtol=2**-8, atol=0)


def test_strided_and_empty_inputs_and_repeated_runs(triton_device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(6, 40, generator=generator).to(triton_device), torch.zeros(40, device=triton_device)
    wide = torch.full((6, 50), 9.0, device=triton_device)
    wide[:, :40] = x
    for form, _, width in forms():
        dense = form(x, bias)
        assert torch.equal(form(wide[:, :40], bias), dense)
        assert torch.equal(form(x.view(2, 3, 40).transpose(0, 1), bias), dense.view(2, 3, -1).transpose(0, 1))
        empty, leaf = x[:0].clone().requires_grad_(), bias.clone().requires_grad_()
        form(empty, leaf).sum().backward()
        assert empty.grad.shape == (0, 40)
        assert torch.equal(leaf.grad, bias)
        gradients = []
        for _ in range(2):
            leaf = bias.clone().requires_grad_()
            form(x, leaf).square().sum().backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients), width


def test_operation_tells_shapes_without_running() -> None:
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(5, 8, dtype=torch.bfloat16)
        assert bias_gelu(x, torch.empty(8)).shape == (5, 8)
        gated = TritonGlu("swiglu")(x, torch.empty(8))
        assert (gated.shape, gated.dtype) == ((5, 4), torch.bfloat16)


@pytest.mark.parametrize("gate", GATES)
def test_gated_specification_pairs_neighbours(gate: str) -> None:
    x = torch.tensor([[2.0, 1.0, -3.0, -0.5]])
    acted = GATES[gate](torch.tensor([1.5, 0.0]))
    expected = torch.tensor([[2.0, -3.0]]) * acted
    torch.testing.assert_close(bias_glu(x, torch.full((4,), 0.5), gate), expected + 0.5 * acted)


def test_an_odd_number_of_gated_features_is_refused() -> None:
    with pytest.raises(ValueError, match="pairs of features, not 7 features"):
        TritonGlu("swiglu")(torch.zeros(2, 7), torch.zeros(7))

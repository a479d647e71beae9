"""LayerNorm in Triton, alone and after an addition, against float64."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.kernels.layer_norm import apex_norm, oracle, triton_norm
from megalm.kernels.layer_norm.triton_norm import add_layer_norm, layer_norm, layer_norm_and_pass

EPS = 1e-5


def example(rows: int, size: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, branch bias, residual, weight, bias."""
    generator = torch.Generator().manual_seed(0)
    wide = [2 * torch.randn(rows, size, generator=generator) + 3, 0.3 * torch.randn(size, generator=generator)]
    wide += [torch.randn(rows, size, generator=generator), 1 + 0.3 * torch.randn(size, generator=generator)]
    wide += [0.3 * torch.randn(size, generator=generator)]
    dtypes = (dtype, weight_dtype, dtype, weight_dtype, weight_dtype)
    return [t.to(device, d).requires_grad_() for t, d in zip(wide, dtypes, strict=True)]


def treat_rows_as_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the kernels of rows of more than 8,192."""
    monkeypatch.setattr(triton_norm, "WIDEST_WITH_SUMS", 16)
    monkeypatch.setattr(triton_norm, "SUM_COLUMNS", 32)


def upstream(like: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device, like.dtype)


def assert_rounded_once(result: Tensor, expected: Tensor, *, terms: float = 1) -> None:
    # Half an epsilon for the rounding; 4e-6 for fp32 arithmetic on normalised values below 8, for each term of a sum.
    bound = 0.5 * torch.finfo(result.dtype).eps * expected.abs() + 4e-6 * terms
    assert ((result.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("rows, size", [(1, 1), (3, 96), (70, 40), (2, 1000)])
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
    rows: int, size: int, dtype: torch.dtype, weight_dtype: torch.dtype, triton_device: torch.device
) -> None:
    x, _, _, weight, bias = example(rows, size, dtype, weight_dtype, triton_device)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    result, expected = layer_norm(x, weight, bias, EPS), oracle.layer_norm(*exact, EPS)
    incoming = upstream(result)
    result.backward(incoming)
    expected.backward(incoming.double())
    assert result.dtype == dtype
    assert_rounded_once(result, expected)
    # A row of one element has no variance: 1 / sqrt(eps) multiplies what cancels.
    assert_rounded_once(x.grad, exact[0].grad, terms=1 if size > 1 else 316)
    for parameter, reference in zip((weight, bias), exact[1:], strict=True):
        assert parameter.grad.dtype == weight_dtype
        assert_rounded_once(parameter.grad, reference.grad, terms=rows)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_beside_a_residual_adds_both_gradients_and_rounds_once(
    dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    if wide:
        treat_rows_as_wide(monkeypatch)
    x, _, _, weight, bias = example(37, 72, dtype, torch.float32, triton_device)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    normed, passed = layer_norm_and_pass(x, weight, bias, EPS)
    assert torch.equal(passed, x)
    expected = oracle.layer_norm(*exact, EPS)
    incoming = [upstream(normed), upstream(passed, seed=2)]
    torch.autograd.backward([normed, passed], incoming)
    torch.autograd.backward([expected, exact[0]], [gradient.double() for gradient in incoming])
    assert_rounded_once(normed, expected)
    assert_rounded_once(x.grad, exact[0].grad, terms=2)
    for parameter, reference in zip((weight, bias), exact[1:], strict=True):
        assert_rounded_once(parameter.grad, reference.grad, terms=37)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_addition_and_layer_norm_in_one_equal_the_two_apart(
    dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    if wide:
        treat_rows_as_wide(monkeypatch)
    ours = example(37, 72, dtype, torch.float32, triton_device)
    exact = [t.detach().double().requires_grad_() for t in ours]
    total, normed = add_layer_norm(*ours, EPS)
    # The sum is rounded before it is normalised, in both.
    reference_total = exact[2] + (exact[0] + exact[1])
    rounded = reference_total + (total.double() - reference_total).detach()
    reference = oracle.layer_norm(rounded, *exact[3:], EPS)
    assert_rounded_once(total, reference_total)
    assert_rounded_once(normed, reference)
    to_total, to_normed = upstream(total), upstream(normed, 2)
    torch.autograd.backward([total, normed], [to_total, to_normed])
    torch.autograd.backward([reference_total, reference], [to_total.double(), to_normed.double()])
    for result, expected in zip(ours, exact, strict=True):
        assert result.grad.dtype == result.dtype
        # The branch bias's gradient of a wide row is a sum of numbers below 8 that were rounded before.
        rounded = wide and result is ours[1]
        terms = 37 if result.dim() == 1 else 1
        assert_rounded_once(
            result.grad, expected.grad, terms=terms * (1 + 8 * torch.finfo(dtype).eps / 4e-6 if rounded else 1)
        )


def test_each_run_gives_the_same_bits(triton_device: torch.device) -> None:
    gradients = []
    for _ in range(2):
        x, _, _, weight, bias = example(70, 40, torch.bfloat16, torch.float32, triton_device)
        layer_norm(x, weight, bias, EPS).backward(upstream(x))
        gradients.append((x.grad, weight.grad, bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_strided_transposed_and_empty_inputs(triton_device: torch.device) -> None:
    x, _, _, weight, bias = (t.detach() for t in example(12, 24, torch.float32, torch.float32, triton_device))
    # Two launches of the same kernel on the same values.
    dense = layer_norm(x, weight, bias, EPS)
    wide = torch.full((12, 30), 9.0, device=triton_device)
    wide[:, :24] = x
    assert torch.equal(layer_norm(wide[:, :24], weight, bias, EPS), dense)
    assert torch.equal(layer_norm(x.t().contiguous().t(), weight, bias, EPS), dense)
    assert torch.equal(
        layer_norm(x.view(3, 4, 24).transpose(0, 1), weight, bias, EPS), dense.view(3, 4, 24).transpose(0, 1)
    )
    empty, weight = x[:0].requires_grad_(), weight.requires_grad_()
    layer_norm(empty, weight, bias, EPS).sum().backward()
    assert empty.grad.shape == (0, 24)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_rows_wider_than_the_registers_hold_are_refused() -> None:
    wide = torch.empty(1, triton_norm.WIDEST + 1)
    with pytest.raises(ValueError, match="at most 32768 elements, not 32769"):
        layer_norm(wide, wide[0], wide[0], EPS)


def test_a_residual_of_another_dtype_is_refused(triton_device: torch.device) -> None:
    x, vector = torch.zeros(2, 8, dtype=torch.bfloat16, device=triton_device), torch.zeros(8, device=triton_device)
    with pytest.raises(ValueError, match=r"the residual is torch.float32 and what is added to it torch.bfloat16"):
        triton_norm.add_layer_norm(x, vector, x.float(), vector, vector, EPS)


def test_operation_tells_shapes_without_running() -> None:
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(5, 8, dtype=torch.bfloat16)
        y, total, mean, _ = torch.ops.megalm.layer_norm(fake, fake, torch.empty(8), torch.empty(8), torch.empty(8), EPS)
        assert (y.shape, y.dtype, total.shape, mean.shape) == (fake.shape, fake.dtype, fake.shape, (5,))


def test_apex_is_refused_with_the_reason_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert apex_norm.obstacle(torch.device("cpu")) == "apex's kernels are for GPUs"
    assert "fused_layer_norm_cuda" in (apex_norm.obstacle(torch.device("cuda")) or "")


def test_apex_is_called_as_its_function_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed_dtype_fused_layer_norm_affine(
        input: Tensor, weight: Tensor, bias: Tensor, normalized_shape: Any, eps: float = 1e-6
    ) -> Tensor:
        # apex's kernel reads contiguous memory, and returns the dtype of the weight.
        assert input.is_contiguous()
        result = torch.nn.functional.layer_norm(
            input.float(), tuple(normalized_shape), weight.float(), bias.float(), eps
        )
        return result.to(weight.dtype)

    module = types.ModuleType("apex.normalization.fused_layer_norm")
    module.mixed_dtype_fused_layer_norm_affine = mixed_dtype_fused_layer_norm_affine  # type: ignore[attr-defined]
    names = ("apex", "apex.normalization", "apex.normalization.fused_layer_norm")
    for name in names:
        monkeypatch.setitem(sys.modules, name, module if name == names[-1] else types.ModuleType(name))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    apex_norm._function.cache_clear()
    try:
        assert apex_norm.obstacle(torch.device("cuda")) is None
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).t()  # [5, 8], strided
        weight, bias = torch.linspace(0.5, 1.5, 8), torch.linspace(-1.0, 1.0, 8)
        result = apex_norm.layer_norm(x, weight, bias, 1e-3)  # an epsilon that shows if it is lost
        assert torch.equal(result, oracle.layer_norm(x, weight, bias, 1e-3))
    finally:
        apex_norm._function.cache_clear()


def test_vectors_with_gaps_are_read_with_their_stride(triton_device: torch.device) -> None:
    x, _, _, weight, bias = example(5, 24, torch.float32, torch.float32, triton_device)
    results = []
    for apart in (1, 2):
        vectors = [torch.zeros(24 * apart, device=triton_device)[::apart] for _ in range(2)]
        for vector, value in zip(vectors, (weight, bias), strict=True):
            vector.copy_(value.detach()).requires_grad_()
        leaf = x.detach().clone().requires_grad_()
        y = layer_norm(leaf, *vectors, EPS)
        y.backward(upstream(y))
        results.append([y.detach(), leaf.grad, *(vector.grad for vector in vectors)])
    for packed, strided in zip(*results, strict=True):
        assert torch.equal(packed, strided)

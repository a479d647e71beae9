"""Rows of logits in Triton, and the fused head on them, against float64 and against torch's form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm.kernels.cross_entropy import triton_rows
from megalm.kernels.cross_entropy.torch_rows import TorchRows
from megalm.kernels.cross_entropy.triton_rows import TritonRows
from megalm.kernels.linear.torch_native import TorchLinear
from megalm.parallel.head_loss import head_cross_entropy
from megalm.topology.group import SOLO

# The loss is of size 8 and its arithmetic in fp32; exp and log round by 2 units in the last place.
LOSS_ERROR = 8 * 4 * 2.0**-24


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and parts a row without long rows."""
    monkeypatch.setattr(triton_rows, "PART_COLUMNS", 128)
    monkeypatch.setattr(triton_rows, "_block", lambda num_columns: (64, 1))


def example(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, columns, generator=generator)).to(device, dtype)
    labels = torch.randint(-1, columns, (rows,), generator=generator).to(device)
    return logits, labels, torch.rand(rows, generator=generator).to(device)


def exact(logits: Tensor, labels: Tensor, weights: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    wide = logits.double().requires_grad_()
    log_sum = torch.logsumexp(wide, dim=-1)
    target = wide.gather(-1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels < 0, 0.0)
    ((log_sum - target + z_loss * log_sum.square()) * weights.double()).sum().backward()
    return log_sum.detach(), wide.grad


@pytest.mark.parametrize("columns", [1, 64, 200, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["triton", "torch"])
def test_rows_match_float64(columns: int, dtype: torch.dtype, form: str, triton_device: torch.device) -> None:
    rows = TritonRows() if form == "triton" else TorchRows()
    logits, labels, weights = example(5, columns, dtype, triton_device)
    log_sum, gradient = exact(logits, labels, weights, 1e-2)
    peak, total = rows.statistics(logits)
    torch.testing.assert_close((peak + total.log()).double(), log_sum, rtol=0, atol=LOSS_ERROR)
    at_once, in_two = logits.clone(), logits.clone()
    found, factors = rows.log_sum_and_gradient_(at_once, labels, weights, z_loss=1e-2)
    rows.gradient_(in_two, labels, found, weights, z_loss=1e-2)
    if factors is not None:
        at_once = at_once.double() * factors.double().unsqueeze(-1)
    torch.testing.assert_close(found.double(), log_sum, rtol=0, atol=LOSS_ERROR)
    # One rounding, of fp32 results below 1 in size; fp16 has no numbers between 0 and 6e-8.
    bound = 0.5 * torch.finfo(dtype).eps * gradient.abs() + 2 * LOSS_ERROR + torch.finfo(dtype).smallest_normal * 2**-11
    for result in (at_once, in_two):
        assert ((result.double() - gradient).abs() <= bound).all()


def test_rows_are_the_same_bits_in_every_run_and_leave_what_is_between_them(triton_device: torch.device) -> None:
    logits, labels, weights = example(4, 150, torch.bfloat16, triton_device)
    results = []
    for _ in range(2):
        wide = torch.full((4, 160), 7.0, dtype=torch.bfloat16, device=triton_device)
        wide[:, :150] = logits
        TritonRows().log_sum_and_gradient_(wide[:, :150], labels, weights, z_loss=0.0)
        results.append(wide)
    assert torch.equal(results[0], results[1])
    assert (results[0][:, 150:] == 7.0).all()


def test_extreme_logits_neither_overflow_nor_vanish(triton_device: torch.device) -> None:
    logits = torch.tensor([[3e4, 3e4, -3e4], [-3e4, -3e4, -6e4]], device=triton_device)
    found, factors = TritonRows().log_sum_and_gradient_(
        logits, torch.tensor([0, 1], device=triton_device), torch.ones(2, device=triton_device), z_loss=0.0
    )
    assert torch.equal(found, torch.tensor([3e4, -3e4], device=triton_device) + 0.6931472)
    # log 2 at 3e4 is known to 2^-9.
    gradient = logits[0] * factors[0]
    torch.testing.assert_close(gradient, torch.tensor([-0.5, 0.5, 0.0], device=triton_device), rtol=2e-3, atol=1e-3)
    assert torch.isnan(TritonRows().statistics(torch.full((1, 3), float("nan"), device=triton_device))[1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("above", [20.0, 100.0])
def test_a_logit_far_above_the_guess_costs_no_accuracy(
    above: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    monkeypatch.setattr(triton_rows, "GUESS_COLUMNS", 16)
    logits, labels, weights = example(5, 200, dtype, triton_device)
    logits[:, 150] += above  # Neither among the first 16 nor a label.
    labels = torch.where(labels == 150, 3, labels)
    log_sum, gradient = exact(logits, labels, weights, 0.0)
    found, factors = TritonRows().log_sum_and_gradient_(logits, labels, weights, z_loss=0.0)
    assert factors is not None
    # log_sum is up to 112, of which fp32 resolves 2^-17; exp of a distance known to 2^-18 is off by as much.
    torch.testing.assert_close(found.double(), log_sum, rtol=2**-22, atol=LOSS_ERROR)
    ours = logits.double() * factors.double().unsqueeze(-1)
    assert ((ours - gradient).abs() <= 0.5 * torch.finfo(dtype).eps * gradient.abs() + 2**-16).all()


def test_a_logit_that_overflows_makes_the_loss_infinite_and_not_wrong(
    monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    monkeypatch.setattr(triton_rows, "GUESS_COLUMNS", 16)
    logits, labels, weights = example(2, 200, torch.bfloat16, triton_device)
    logits[1, 150] = 500.0
    labels = torch.tensor([3, 3], device=triton_device)
    found, _ = TritonRows().log_sum_and_gradient_(logits, labels, weights, z_loss=0.0)
    assert torch.isfinite(found[0])
    assert torch.isinf(found[1])


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_scaling_multiplies_by_a_number_on_the_device(factor: float, triton_device: torch.device) -> None:
    x = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0)).to(triton_device, torch.bfloat16)
    expected = x * factor
    TritonRows().scale_(x, torch.tensor(factor, device=triton_device))
    assert torch.equal(x, expected)


@pytest.mark.parametrize("width", [1, 37, 1500])
def test_scaling_rows_multiplies_each_by_its_own_factor(width: int, triton_device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, width, generator=generator).to(triton_device, torch.bfloat16)
    factors = torch.tensor([1.0, -0.37, 3e-4], device=triton_device)
    expected = (x.double() * factors.double().unsqueeze(-1)).bfloat16()
    assert torch.equal(TritonRows().scaled(x, factors), expected)
    more = torch.tensor(0.25, device=triton_device)
    TritonRows().scale_(x, more, factors)
    assert torch.equal(x, expected * 0.25)


def test_fused_head_of_triton_rows_matches_torch_rows(triton_device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    values = [
        (torch.randn(*size, generator=generator) / 4).to(triton_device, torch.bfloat16) for size in ((9, 16), (150, 16))
    ]
    labels = torch.randint(150, (9,), generator=generator).to(triton_device)
    weights = torch.full((9,), 1 / 9, device=triton_device)
    results = []
    for rows in (TritonRows(), TorchRows()):
        x, weight = (value.clone().requires_grad_() for value in values)
        loss = head_cross_entropy(x, weight, labels, weights, tp=SOLO, rows=rows, kernel=TorchLinear(), z_loss=1e-3)
        loss.backward()
        results.append((loss.detach(), x.grad, weight.grad))
    (ours, x_ours, weight_ours), (theirs, x_theirs, weight_theirs) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    logits = (values[0] @ values[1].t()).double().requires_grad_()
    log_sum = logits.logsumexp(-1)
    picked = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    ((log_sum - picked + 1e-3 * log_sum.square()) / 9).sum().backward()
    sizes = logits.grad.abs()
    # Rounding to the 8 bits of bf16 changes a number by 2^-8 of it at most. Each side rounds gradients of logits, ours
    # scaled rows of x as well; then the product is rounded, ours once more with its factor. fp32 sums add little.
    unit = 2.0**-8 * 1.01
    of_x = 2 * unit * (sizes @ values[1].double().abs()) + 3 * unit * x_theirs.double().abs()
    of_weight = 3 * unit * (sizes.t() @ values[0].double().abs()) + 2 * unit * weight_theirs.double().abs()
    assert ((x_ours.double() - x_theirs.double()).abs() <= of_x).all()
    assert ((weight_ours.double() - weight_theirs.double()).abs() <= of_weight).all()

"""Gradient sums: torch's form and Triton's against float64."""

from __future__ import annotations

import pytest
import torch

from megalm.kernels.gradient_sum import triton_sum
from megalm.kernels.gradient_sum.oracle import TorchGradientSum
from megalm.kernels.gradient_sum.protocol import GradientSumKernel
from megalm.kernels.gradient_sum.triton_sum import TritonGradientSum

FORMS = {"torch": TorchGradientSum, "triton": TritonGradientSum}
ULP = 2.0**-23


@pytest.fixture(params=FORMS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> GradientSumKernel:
    monkeypatch.setattr(triton_sum, "BLOCK", 256)  # Several programs without large tensors.
    monkeypatch.setattr(triton_sum, "MOST_COLUMNS", 16)
    form: GradientSumKernel = FORMS[request.param]()
    return form


def _normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("factor", [None, 0.125, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1,), (700,), (30, 41)])
def test_sum_rounds_once(
    kernel: GradientSumKernel, shape: tuple[int, ...], dtype: torch.dtype, factor: float | None,
    triton_device: torch.device,
) -> None:  # fmt: skip
    total, gradient = _normal(*shape).to(triton_device), _normal(*shape, seed=1).to(triton_device, dtype)
    exact = total.double() + gradient.double() * (1.0 if factor is None else factor)
    kernel.add_(total, gradient, factor=None if factor is None else torch.tensor(factor, device=triton_device))
    # One rounding of the sum; with a factor one of the product, which is below 16.
    assert ((total.double() - exact).abs() <= 0.5 * ULP * (exact.abs() + (0 if factor is None else 16))).all()


def test_a_transposed_gradient_is_added_where_it_belongs(
    kernel: GradientSumKernel, triton_device: torch.device
) -> None:
    gradient = _normal(20, 30).to(triton_device).t()
    total = torch.zeros(600, device=triton_device)
    kernel.add_(total, gradient)
    assert torch.equal(total.view(30, 20), gradient)


@pytest.mark.parametrize("ids", [[3], [2, 2, 2], [-1, 4, -1, 0, 4, -1], [7] * 21 + [0] * 8 + [5, -1, 9]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_added_to_those_of_their_ids(
    kernel: GradientSumKernel, ids: list[int], dtype: torch.dtype, triton_device: torch.device
) -> None:
    rows = _normal(len(ids), 40).to(triton_device, dtype)
    total = _normal(10, 40, seed=1).to(triton_device)
    exact = total.double()
    for at, row in zip(ids, rows, strict=True):
        if at >= 0:
            exact[at] += row.double()
    kernel.add_rows_(total, torch.tensor(ids, device=triton_device), rows)
    # 22 terms below 4 in size at most, each sum of them rounded once.
    assert ((total.double() - exact).abs() <= 22 * ULP * 4 * 22).all()
    untouched = sorted(set(range(10)) - set(ids))
    assert torch.equal(total[untouched].double(), exact[untouched])


def test_rows_are_added_in_the_same_order_in_every_run(triton_device: torch.device) -> None:
    ids = (torch.arange(300) * 7919 % 11).to(triton_device)
    rows = _normal(300, 24).to(triton_device)
    sums = [torch.zeros(11, 24, device=triton_device) for _ in range(3)]
    for total in sums:
        TritonGradientSum().add_rows_(total, ids, rows)
    assert all(torch.equal(total, sums[0]) for total in sums)


def test_no_rows_add_nothing(kernel: GradientSumKernel, triton_device: torch.device) -> None:
    total = torch.ones(3, 4, device=triton_device)
    kernel.add_rows_(
        total, torch.empty(0, dtype=torch.int64, device=triton_device), torch.empty(0, 4, device=triton_device)
    )
    assert torch.equal(total, torch.ones_like(total))

"""The update: torch's form and Triton's against float64, step by step, and against torch.optim.AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.kernels.adamw import triton_adamw
from megalm.kernels.adamw.oracle import TorchAdamW
from megalm.kernels.adamw.protocol import AdamWKernel
from megalm.kernels.adamw.triton_adamw import TritonAdamW

FORMS = {"torch": TorchAdamW, "triton": TritonAdamW}
U = 2.0**-24
"""The error of one rounding to fp32, relative to the result."""
STEPS = 5
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_adamw, "BLOCK", 256)  # Several programs without large tensors.


@pytest.fixture(params=FORMS)
def kernel(request: pytest.FixtureRequest) -> AdamWKernel:
    form: AdamWKernel = FORMS[request.param]()
    return form


class Run:
    """Parameters under one kernel, with gradients of many sizes."""

    def __init__(
        self, kernel: AdamWKernel, device: torch.device, *, size: int = 700, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.kernel, self.device = kernel, device
        self._generator = torch.Generator().manual_seed(size)
        self.master = self._normal(size)
        self.weight = torch.full_like(self.master, torch.nan, dtype=dtype)
        self.gradient = torch.zeros_like(self.master)
        self.state = {name: torch.zeros_like(self.master) for name in ("exp_avg", "exp_avg_sq")}
        self.state["step"] = torch.zeros((), device=device)

    def _normal(self, size: int) -> Tensor:
        return torch.randn(size, generator=self._generator).to(self.device)

    def draw(self) -> None:
        """Gradients from 1e-12 to 1e3, and zeros."""
        sizes = 10.0 ** (15.0 * torch.rand(self.master.numel(), generator=self._generator) - 12.0)
        self.gradient += self._normal(self.master.numel()) * sizes.to(self.device)
        self.gradient[::7] = 0.0

    def update(self, **options: Any) -> None:
        self.kernel.update_(self.master, self.gradient, self.weight, **self.state, **{**OPTIONS, **options})


def exact_update(run: Run, *, factor: float | None, **changed: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Each tensor after one update of what the run holds, in float64, and how far fp32 may be from it.

    Every operation rounds once, its result or an option of it: the bounds add these up, an operation at a time, for
    the longest way of writing a formula out. Products of two errors are left out, and 1 % is room for them.
    """
    options = {**OPTIONS, **changed}
    (beta1, beta2), lr, decay = options["betas"], options["lr"], options["weight_decay"]
    p, m, v = (t.double() for t in (run.master, run.state["exp_avg"], run.state["exp_avg_sq"]))
    count = run.state["step"].item() + 1
    g = run.gradient.double() / (factor or 1.0)  # 1 rounding
    new_m = beta1 * m + (1 - beta1) * g
    # Of the result; of beta1 and beta1 m; of g, 1 - beta1, g - m or not, and the product of the two.
    m_error = U * (new_m.abs() + 2 * m.abs() + 4 * (1 - beta1) * (g.abs() + m.abs()))
    new_v = beta2 * v + (1 - beta2) * g * g
    # As before, with g twice and its square.
    v_error = U * (new_v + 2 * v + 6 * (1 - beta2) * (g * g + v))
    decayed = p - lr * decay * p
    # Of the result, or of 1 - lr decay and the product; of lr decay and its product with p.
    p_error = U * (decayed.abs() + p.abs() + 3 * lr * decay * p.abs())
    step_size = lr / (1 - beta1**count)
    divisor = (new_v / (1 - beta2**count)).sqrt() + options["eps"]
    change = step_size * new_m / divisor
    # Of lr, the correction, their quotient, the product, the root, the second correction, their quotient, eps, the sum
    # and the quotient; a root has half of its argument's relative error.
    change_error = 10 * U * change.abs() + step_size * m_error / divisor
    change_error += change.abs() * (v_error / (2 * new_v)).nan_to_num()
    p_error += change_error + U * (decayed - change).abs()
    found = {"exp_avg": (new_m, m_error), "exp_avg_sq": (new_v, v_error), "master": (decayed - change, p_error)}
    # What is smaller than 2^-126 has fewer digits.
    return {name: (value, 1.01 * error + 2.0**-149) for name, (value, error) in found.items()}


@pytest.mark.parametrize("size", [1, 255, 256, 257, 700])
@pytest.mark.parametrize("factor", [None, 3.0])
@pytest.mark.parametrize("changed", [{}, {"weight_decay": 0.0}, {"betas": (0.0, 0.95), "eps": 1e-5}], ids=str)
def test_every_step_is_float64s_but_for_the_roundings_of_fp32(
    kernel: AdamWKernel, size: int, factor: float | None, changed: dict[str, Any], triton_device: torch.device
) -> None:
    # On a GPU torch rounds beta2 to fp32 before it takes it from 1, which loses digits: its form is the CPU's.
    run = Run(kernel, triton_device if isinstance(kernel, TritonAdamW) else torch.device("cpu"), size=size)
    for _ in range(STEPS):
        run.draw()
        expected = exact_update(run, factor=factor, **changed)
        run.update(**changed, factor=None if factor is None else torch.tensor(factor, device=run.device))
        for name, (value, bound) in expected.items():
            got = run.master if name == "master" else run.state[name]
            assert ((got.double() - value).abs() <= bound).all(), name
    assert run.state["step"].item() == STEPS


def test_late_corrections_are_float64s(kernel: AdamWKernel, triton_device: torch.device) -> None:
    run = Run(kernel, triton_device if isinstance(kernel, TritonAdamW) else torch.device("cpu"))
    for count in (999.0, 20_000.0, 2.0**23):
        run.state["step"].fill_(count)
        run.draw()
        value, bound = exact_update(run, factor=None)["master"]
        run.update()
        assert ((run.master.double() - value).abs() <= bound).all()


@pytest.mark.parametrize("factor", [None, 3.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_of_torchs_optimizer_are_as_far_from_float64(
    factor: float | None, weight_decay: float, triton_device: torch.device
) -> None:
    """Both begin each step where torch's ended the one before."""
    run = Run(TritonAdamW(), triton_device)
    parameter = torch.nn.Parameter(run.master.to("cpu", copy=True))
    optimizer = torch.optim.AdamW([parameter], **{**OPTIONS, "weight_decay": weight_decay}, fused=True)
    for _ in range(STEPS):
        run.draw()
        expected = exact_update(run, factor=factor, weight_decay=weight_decay)
        parameter.grad = run.gradient.to("cpu", copy=True)
        optimizer.grad_scale = None if factor is None else torch.tensor(factor)  # type: ignore[attr-defined]
        optimizer.step()
        run.update(
            weight_decay=weight_decay, factor=None if factor is None else torch.tensor(factor, device=triton_device)
        )
        theirs = {**optimizer.state[parameter], "master": parameter.detach()}
        assert theirs.keys() == {*run.state, "master"}
        assert theirs["step"].item() == run.state["step"].item()
        for name, (value, bound) in expected.items():
            ours = run.master if name == "master" else run.state[name]
            for result in (ours, theirs[name].to(triton_device)):
                assert ((result.double() - value).abs() <= bound).all(), name
            ours.copy_(theirs[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_the_masters_rounded_and_the_sums_are_cleared(
    kernel: AdamWKernel, dtype: torch.dtype, triton_device: torch.device
) -> None:
    run = Run(kernel, triton_device, dtype=dtype)
    # Halfway between two numbers of 16 bits, where the last bit of the lower one is 0 and 1; without a gradient and
    # decay they stay. And what fp16 has no number for.
    eps = torch.finfo(dtype).eps
    ties = torch.tensor([1 + eps / 2, 1 + 1.5 * eps, -1 - eps / 2, -1 - 1.5 * eps, 1e-6, 3e38, 1e-40])
    run.master[: ties.numel()] = ties.to(triton_device)
    for _ in range(STEPS):
        run.draw()
        run.gradient[: ties.numel()] = 0.0
        run.update(weight_decay=0.0)
        assert torch.equal(run.master[: ties.numel()].cpu(), ties)
        assert torch.equal(run.weight, run.master.to(dtype))
        assert torch.equal(run.gradient, torch.zeros_like(run.gradient))


def test_nothing_outside_the_part_is_touched(kernel: AdamWKernel, triton_device: torch.device) -> None:
    """Weights and sums are the middle of flat buffers, which begin there at no multiple of 16 bytes."""
    run = Run(kernel, triton_device)
    alone = Run(kernel, triton_device)
    weights, sums = torch.full((902,), 7.0, device=triton_device).bfloat16(), torch.full((902,), 7.0).to(triton_device)
    run.weight, run.gradient = weights[101:801], sums[101:801]
    run.gradient.zero_()
    for one in (run, alone):
        one.draw()
        one.update()
    assert torch.equal(run.master, alone.master)
    assert torch.equal(weights[101:801], alone.weight)
    assert not sums[101:801].any()
    for flat in (weights, sums):
        assert (flat[:101] == 7.0).all()
        assert (flat[801:] == 7.0).all()


def test_no_parameters_count_the_step(kernel: AdamWKernel, triton_device: torch.device) -> None:
    run = Run(kernel, triton_device, size=0)
    run.update()
    assert run.state["step"].item() == 1


def test_every_run_gives_the_same_bits(triton_device: torch.device) -> None:
    runs = [Run(TritonAdamW(), triton_device) for _ in range(3)]
    for run in runs:
        for _ in range(STEPS):
            run.draw()
            run.update(factor=torch.tensor(3.0, device=triton_device))
    for run in runs[1:]:
        assert torch.equal(run.master, runs[0].master)
        assert torch.equal(run.weight, runs[0].weight)
        assert all(torch.equal(run.state[name], runs[0].state[name]) for name in run.state)

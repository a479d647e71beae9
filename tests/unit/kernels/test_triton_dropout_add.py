"""Bias-dropout-add in Triton against its specification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm.kernels.dropout_add import oracle, triton_dropout
from megalm.kernels.dropout_add.triton_dropout import bias_dropout_add
from megalm.parallel.random import RngStreams
from megalm.topology.group import SOLO, Group


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_dropout, "COLUMNS", 32)


def example(dtype: torch.dtype, device: torch.device, size: int = 50) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(*shape, generator=generator) for shape in ((4, 20, size), (size,), (4, 20, size))]
    return [value.to(device, dtype).requires_grad_() for value in values]


def generator_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def test_without_training_or_probability_it_is_the_specification_and_draws_no_number(
    triton_device: torch.device,
) -> None:
    ours = example(torch.float32, triton_device)
    before = generator_state(triton_device)
    for prob, training in ((0.5, False), (0.0, True)):
        # The same fp32 additions in the same order.
        assert torch.equal(bias_dropout_add(*ours, prob, training), oracle.bias_dropout_add(*ours, prob, training))
    assert torch.equal(generator_state(triton_device), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_are_dropped_or_rescaled_and_backward_finds_the_same_ones(
    dtype: torch.dtype, triton_device: torch.device
) -> None:
    x, bias, residual = example(dtype, triton_device)
    torch.manual_seed(3)
    y = bias_dropout_add(x, bias, residual, 0.2, True)
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(triton_device, dtype)
    y.backward(incoming)
    dropped = x.grad == 0
    # 4,000 draws of probability 0.2: a standard deviation of 0.0063, five of them.
    assert abs(dropped.float().mean().item() - 0.2) < 0.032
    kept = torch.where(dropped, 0.0, 1.25).double()
    exact = residual.double() + (x.double() + bias.double()) * kept
    eps = torch.finfo(dtype).eps
    # One rounding; fp32 arithmetic on numbers below 16.
    assert ((y.double() - exact).abs() <= 0.5 * eps * exact.abs() + 16 * 2**-23).all()
    slope = incoming.double() * kept
    assert ((x.grad.double() - slope).abs() <= 0.5 * eps * slope.abs() + 2**-22).all()
    total = slope.sum((0, 1))
    assert ((bias.grad.double() - total).abs() <= 0.5 * eps * total.abs() + 80 * 2**-22).all()
    assert torch.equal(residual.grad, incoming)


def test_the_streams_of_the_run_decide_what_is_dropped(triton_device: torch.device) -> None:
    x, bias, residual = (t.detach() for t in example(torch.float32, triton_device))

    def draw() -> Tensor:
        return bias_dropout_add(x, bias, residual, 0.5, True)

    streams = RngStreams(9, tp=SOLO, pp=SOLO, dp=SOLO, device=triton_device)
    state = streams.state_dict()
    with streams.tensor_parallel():
        sharded = draw()
    replicated = draw()
    assert not torch.equal(sharded, replicated)
    assert not torch.equal(draw(), replicated)
    streams.load_state_dict(state)
    assert torch.equal(draw(), replicated)
    with streams.tensor_parallel():
        assert torch.equal(draw(), sharded)
    other = RngStreams(9, tp=Group(rank=1, size=2, ranks=(0, 1), handle=None), pp=SOLO, dp=SOLO, device=triton_device)
    assert torch.equal(draw(), replicated)
    with other.tensor_parallel():
        assert not torch.equal(draw(), sharded)


def test_the_mask_does_not_repeat_along_rows_or_columns(triton_device: torch.device) -> None:
    ones, zeros = torch.ones(64, 96, device=triton_device), torch.zeros(96, device=triton_device)
    torch.manual_seed(5)
    kept = bias_dropout_add(ones, zeros, torch.zeros_like(ones), 0.5, True) > 0
    for shifted in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(4, 1), kept.roll(32, 1)):
        # Half of 6,144 independent pairs agree: a standard deviation of 0.0064, five of them.
        assert abs((kept == shifted).float().mean().item() - 0.5) < 0.032


def test_strided_and_empty_inputs(triton_device: torch.device) -> None:
    x, bias, residual = (t.detach() for t in example(torch.float32, triton_device))
    wide = torch.full((4, 20, 60), 9.0, device=triton_device)
    wide[..., :50] = x
    assert torch.equal(
        bias_dropout_add(wide[..., :50], bias, residual, 0.0, True), bias_dropout_add(x, bias, residual, 0.0, True)
    )
    assert torch.equal(
        bias_dropout_add(x.transpose(0, 1), bias, residual.transpose(0, 1), 0.0, True),
        bias_dropout_add(x, bias, residual, 0.0, True).transpose(0, 1),
    )
    leaf = bias.requires_grad_()
    bias_dropout_add(x[:0], leaf, residual[:0], 0.1, True).sum().backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_the_bias_gradient_repeats_to_the_bit(triton_device: torch.device) -> None:
    x, bias, residual = (t.detach() for t in example(torch.float32, triton_device))
    gradients = []
    for _ in range(2):
        leaf = bias.clone().requires_grad_()
        torch.manual_seed(3)
        bias_dropout_add(x, leaf, residual, 0.3, True).square().sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].any()
    assert torch.equal(*gradients)

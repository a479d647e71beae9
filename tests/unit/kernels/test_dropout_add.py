"""Dropout-add and its biased form."""

from __future__ import annotations

import torch

from megalm.kernels.dropout_add.oracle import bias_dropout_add, dropout_add


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 100, 50, generator=generator)
    return x, torch.randn(50, generator=generator), residual


def test_without_training_or_probability_it_adds_and_draws_no_number() -> None:
    x, bias, residual = example()
    before = torch.get_rng_state()
    for prob, training in ((0.5, False), (0.0, True)):
        assert torch.equal(dropout_add(x, residual, prob, training), residual + x)
        assert torch.equal(bias_dropout_add(x, bias, residual, prob, training), residual + (x + bias))
    assert torch.equal(torch.get_rng_state(), before)


def test_each_element_is_dropped_or_rescaled_before_the_addition() -> None:
    x, bias, residual = example()
    torch.manual_seed(1)
    branch = dropout_add(x, torch.zeros_like(x), 0.2, True)
    dropped = branch == 0
    # Multiplying by 1 / 0.8 rather than dividing is one rounding apart.
    torch.testing.assert_close(branch[~dropped], (x / 0.8)[~dropped], rtol=2e-7, atol=0)
    # 5,000 draws of probability 0.2: a standard deviation of 0.0057, five of them.
    assert abs(dropped.float().mean().item() - 0.2) < 0.029
    torch.manual_seed(1)
    assert torch.equal(dropout_add(x, residual, 0.2, True), residual + branch)
    torch.manual_seed(1)
    assert torch.equal(bias_dropout_add(x, bias, residual, 0.2, True), dropout_add_of_sum(x + bias, residual))


def dropout_add_of_sum(branch: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    return dropout_add(branch, residual, 0.2, True)

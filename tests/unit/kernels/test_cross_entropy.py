"""Cross-entropy on one device against float64."""

from __future__ import annotations

import math

import pytest
import torch

from megalm.kernels.cross_entropy.oracle import cross_entropy


# fp32 arithmetic on losses below 16; for bf16 the logits are exact inputs and only the gradient is rounded.
@pytest.mark.parametrize("dtype, grad_tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-9)])
def test_cross_entropy_matches_float64_forward_and_grad(dtype: torch.dtype, grad_tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, 3, 40, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(40, (5, 3), generator=generator)
    exact = logits.detach().double().requires_grad_()
    loss = cross_entropy(logits, labels)
    expected = -torch.log_softmax(exact, dim=-1).gather(-1, labels[..., None])[..., 0]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=4e-6)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=0, atol=grad_tolerance)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    loss = cross_entropy(torch.full((2, 1000), 1e4), torch.tensor([0, 999]))
    # fp32 at 1e4 resolves 0.001 nats.
    torch.testing.assert_close(loss, torch.full((2,), math.log(1000)), rtol=0, atol=1e-3)

"""Scale-mask-softmax against float64."""

from __future__ import annotations

import pytest
import torch

from megalm.kernels.softmax.oracle import scale_mask_softmax


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = 5 * torch.randn(2, 3, 16, 16, generator=generator)
    mask = torch.rand(2, 1, 16, 16, generator=generator) < 0.4
    mask[..., 0] = False
    return scores, mask


# One rounding of a weight below 1, to the dtype; fp32 sums of 16 terms.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-7), (torch.bfloat16, 2**-9 + 3e-7)])
def test_softmax_matches_float64_forward_and_grad(dtype: torch.dtype, tolerance: float) -> None:
    scores, mask = example()
    ours = scores.to(dtype).requires_grad_()
    exact = ours.detach().double().requires_grad_()
    result = scale_mask_softmax(ours, mask, scale=0.3)
    expected = torch.softmax((0.3 * exact).masked_fill(mask, float("-inf")), dim=-1)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)

    generator = torch.Generator().manual_seed(1)
    incoming = torch.randn(scores.shape, generator=generator).to(dtype)
    result.backward(incoming)
    expected.backward(incoming.double())
    # The incoming gradient is below 4, and the result of the backward pass is rounded once more.
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=0, atol=4 * tolerance)


def test_masked_weights_are_exactly_zero_and_a_row_sums_to_one() -> None:
    scores, mask = example()
    weights = scale_mask_softmax(scores, mask, scale=1.0)
    assert (weights[mask.expand_as(weights)] == 0).all()
    # Sixteen fp32 roundings of numbers below 1.
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 16), rtol=0, atol=1e-6)


def test_row_that_is_masked_throughout_has_zero_weights_and_gradient() -> None:
    scores, mask = example()
    mask[0, 0, 5] = True
    scores.requires_grad_()
    weights = scale_mask_softmax(scores, mask, scale=1.0)
    weights.square().sum().backward()
    assert torch.equal(weights[0, :, 5], torch.zeros(3, 16))
    assert torch.equal(scores.grad[0, :, 5], torch.zeros(3, 16))


def test_fp16_scores_are_scaled_in_fp32() -> None:
    scores = torch.tensor([[60000.0, 50000.0]], dtype=torch.float16)
    weights = scale_mask_softmax(scores, None, scale=2.0)
    assert weights.tolist() == [[1.0, 0.0]]

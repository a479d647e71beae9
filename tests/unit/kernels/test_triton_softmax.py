"""Scale-mask-softmax in Triton against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm.kernels.softmax.triton_softmax import WIDEST, scale_mask_softmax


def example(queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = 5 * torch.randn(2, 3, queries, keys, generator=generator)
    mask = torch.rand(2, 1, queries, keys, generator=generator) < 0.4
    mask[..., 0] = False
    return scores.to(device), mask.to(device)


# One rounding of a weight below 1, to the dtype; fp32 sums of some dozens of terms.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-7), (torch.bfloat16, 2**-9 + 3e-7)])
@pytest.mark.parametrize("queries, keys", [(1, 1), (7, 16), (5, 50)])
@pytest.mark.parametrize("masked", [True, False])
def test_softmax_matches_float64_forward_and_grad(
    queries: int, keys: int, masked: bool, dtype: torch.dtype, tolerance: float, triton_device: torch.device
) -> None:
    scores, mask = example(queries, keys, triton_device)
    ours = scores.to(dtype).requires_grad_()
    exact = ours.detach().double().requires_grad_()
    result = scale_mask_softmax(ours, mask if masked else None, scale=0.3)
    wide = 0.3 * exact
    expected = torch.softmax(wide.masked_fill(mask, float("-inf")) if masked else wide, dim=-1)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)
    incoming = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1)).to(triton_device, dtype)
    result.backward(incoming)
    expected.backward(incoming.double())
    # The incoming gradient is below 4, and the result of the backward pass is rounded once more.
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=0, atol=4 * tolerance)


def test_masked_weights_and_rows_masked_throughout_are_exactly_zero(triton_device: torch.device) -> None:
    scores, mask = example(6, 20, triton_device)
    mask[0, 0, 5] = True
    scores.requires_grad_()
    weights = scale_mask_softmax(scores, mask, scale=1.0)
    weights.square().sum().backward()
    assert (weights[mask.expand_as(weights)] == 0).all()
    assert torch.equal(scores.grad[0, :, 5], torch.zeros(3, 20, device=triton_device))


def test_strided_scores_other_masks_and_empty_inputs(triton_device: torch.device) -> None:
    scores, mask = example(6, 20, triton_device)
    dense = scale_mask_softmax(scores, mask, scale=2.0)
    strided = scores.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(scale_mask_softmax(strided, mask, scale=2.0), dense)
    flat = torch.equal(scale_mask_softmax(scores[0, 0], mask[0, 0], scale=2.0), dense[0, 0])
    assert flat
    causal = torch.ones(6, 20, dtype=torch.bool, device=triton_device).triu(1)
    assert (scale_mask_softmax(scores, causal, scale=1.0)[causal.expand_as(scores)] == 0).all()
    assert scale_mask_softmax(scores[:0], mask[:0], scale=1.0).shape == (0, 3, 6, 20)
    with pytest.raises(ValueError, match="k at most"):
        scale_mask_softmax(torch.empty(1, WIDEST + 1), None, scale=1.0)


def test_no_score_is_below_what_is_masked(triton_device: torch.device) -> None:
    scores = torch.tensor([[-2.0e38, -3.0e38, 0.0], [-torch.finfo(torch.float32).max] * 3], device=triton_device)
    mask = torch.tensor([[False, False, True], [False, False, True]], device=triton_device)
    weights = scale_mask_softmax(scores, mask, scale=1.0)
    assert weights.tolist() == [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]

"""The bias that all layers share."""

from __future__ import annotations

import torch

from megalm.kernels.alibi import alibi_bias, alibi_slopes
from megalm.kernels.attention.bias_cache import CausalAlibiCache


def test_bias_is_alibi_below_the_diagonal_and_minus_infinity_above() -> None:
    bias = CausalAlibiCache().get(alibi_slopes(4), 7, torch.float32)
    below = torch.ones(7, 7, dtype=torch.bool).tril()
    assert torch.equal(bias[:, below], alibi_bias(alibi_slopes(4), 7)[:, below])
    assert torch.isneginf(bias[:, ~below]).all()


def test_layers_share_one_bias_even_through_copies_of_the_slopes() -> None:
    cache = CausalAlibiCache()
    slopes = alibi_slopes(4)
    first = cache.get(slopes, 8, torch.float32)
    assert cache.get(slopes, 8, torch.float32).data_ptr() == first.data_ptr()
    assert cache.get(slopes.clone(), 8, torch.float32).data_ptr() == first.data_ptr()


def test_shorter_length_is_the_corner_of_a_longer_one_and_a_longer_one_is_built() -> None:
    cache = CausalAlibiCache()
    slopes = alibi_slopes(4)
    first = cache.get(slopes, 8, torch.float32)
    assert cache.get(slopes, 5, torch.float32).data_ptr() == first.data_ptr()
    assert torch.equal(cache.get(slopes, 5, torch.float32), CausalAlibiCache().get(slopes, 5, torch.float32))
    assert cache.get(slopes, 9, torch.float32).shape == (4, 9, 9)


def test_other_slopes_and_dtypes_get_their_own_bias() -> None:
    cache = CausalAlibiCache()
    slopes = alibi_slopes(8)
    first_half = cache.get(slopes[:4], 8, torch.float32)
    assert not torch.equal(cache.get(slopes[4:], 8, torch.float32), first_half)
    assert cache.get(slopes[:4], 8, torch.bfloat16).dtype == torch.bfloat16


def test_slopes_changed_in_place_are_not_served_the_old_bias() -> None:
    cache = CausalAlibiCache()
    slopes = alibi_slopes(4)
    before = cache.get(slopes, 8, torch.float32).clone()
    slopes.mul_(0.5)
    after = cache.get(slopes, 8, torch.float32)
    below = torch.ones(8, 8, dtype=torch.bool).tril()
    assert torch.equal(after[:, below], 0.5 * before[:, below])


def test_bias_built_in_inference_mode_serves_training() -> None:
    cache = CausalAlibiCache()
    slopes = alibi_slopes(4)
    with torch.inference_mode():
        cache.get(slopes, 8, torch.float32)
    scores = torch.zeros(4, 8, 8, requires_grad=True)
    (scores * cache.get(slopes, 8, torch.float32).clamp(min=-100)).sum().backward()
    assert scores.grad is not None

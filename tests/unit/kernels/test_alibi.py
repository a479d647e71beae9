"""ALiBi against transformers' Bloom."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm.kernels.alibi import alibi_bias, alibi_slopes, build_alibi_tensor

bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")


def transformers_slopes(num_heads: int) -> Tensor:
    """What transformers' Bloom gives the second of two tokens is the slope itself."""
    mask = torch.ones(1, 2, dtype=torch.long)
    return bloom.build_alibi_tensor(mask, num_heads, torch.float32)[:, 0, 1]


def test_slopes_equal_transformers_bit_for_bit_for_1_to_128_heads() -> None:
    different = [n for n in range(1, 129) if not torch.equal(alibi_slopes(n), transformers_slopes(n))]
    assert different == []


def test_slopes_of_six_heads_are_the_published_ones() -> None:
    assert alibi_slopes(6).tolist() == [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]


def test_slopes_refuse_no_heads() -> None:
    with pytest.raises(ValueError, match="num_heads = 0 must be positive"):
        alibi_slopes(0)


MASKS = {
    "whole": [[1, 1, 1, 1, 1, 1]],
    "padded left": [[0, 0, 1, 1, 1, 1]],
    "padded right": [[1, 1, 1, 1, 0, 0]],
    "padded inside": [[1, 0, 1, 1, 0, 1]],
    "empty": [[0, 0, 0, 0, 0, 0]],
    "a different one each": [[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 1]],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_heads", [4, 6])
def test_alibi_tensor_of_a_mask_equals_transformers(mask: list[list[int]], dtype: torch.dtype, num_heads: int) -> None:
    ours = build_alibi_tensor(torch.tensor(mask), num_heads, dtype)
    theirs = bloom.build_alibi_tensor(torch.tensor(mask), num_heads, dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)


def test_alibi_tensor_accepts_a_bool_mask() -> None:
    mask = torch.tensor(MASKS["a different one each"])
    expected = build_alibi_tensor(mask, 4, torch.float32)
    assert torch.equal(build_alibi_tensor(mask.bool(), 4, torch.float32), expected)


def test_bias_is_the_slope_times_the_distance_exactly() -> None:
    bias = alibi_bias(alibi_slopes(4), 300)
    # The slopes of four heads are powers of two, so that every product is exact.
    assert bias[1, 299, 0].item() == -299 / 16
    assert bias[1, 299, 298].item() == -1 / 16
    assert torch.equal(bias.diagonal(dim1=1, dim2=2), torch.zeros(4, 300))

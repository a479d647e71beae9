"""The checksum behind the replica comparison."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megalm.parallel.replicas import bit_checksum, replica_difference
from megalm.topology.group import SOLO


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_single_bit_flip_changes_the_checksum(dtype: torch.dtype) -> None:
    tensor = torch.randn(6).to(dtype)
    original = bit_checksum(tensor).item()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    for element in range(tensor.numel()):
        for bit in range(8 * tensor.element_size()):
            flipped = tensor.clone()
            bits = flipped.view(integers)
            # The sign bit of a signed integer: 1 << bit overflows, its negative is the same pattern.
            bits[element] ^= -(1 << bit) if bit == 8 * tensor.element_size() - 1 else 1 << bit
            assert bit_checksum(flipped).item() != original


def test_exchanged_elements_change_the_checksum() -> None:
    assert bit_checksum(torch.tensor([1.0, 2.0])) != bit_checksum(torch.tensor([2.0, 1.0]))


def test_negative_zero_is_not_zero() -> None:
    assert bit_checksum(torch.tensor([0.0])) != bit_checksum(torch.tensor([-0.0]))


def test_one_rank_has_no_replicas() -> None:
    assert replica_difference([("w", nn.Parameter(torch.ones(2)))], SOLO) == []

"""The checksum behind the replica comparison."""

from __future__ import annotations

import pytest
import torch

from megalm.parallel import replicas
from megalm.parallel.replicas import Copies, Drift, _drifts, bit_checksum
from megalm.topology.group import Group


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


def test_the_checksum_does_not_depend_on_where_a_tensor_lies() -> None:
    buffer = torch.randn(101).bfloat16()
    for start in range(4):
        part = buffer[start : start + 96]
        assert bit_checksum(part) == bit_checksum(part.clone())


def test_changes_in_words_after_the_first_million_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_NUM_WORDS", 4)
    tensor = torch.randn(11)
    seen = {bit_checksum(tensor).item(), bit_checksum(tensor.roll(4)).item()}
    for element in range(11):
        flipped = tensor.clone()
        flipped.view(torch.int32)[element] ^= 1
        seen.add(bit_checksum(flipped).item())
    assert len(seen) == 13


def test_ranks_are_odd_where_most_others_agree() -> None:
    group = Group(1, 4, None, (0, 2, 4, 6))
    checksums = {"tie": [1, 1, 2, 2], "one": [1, 5, 1, 1], "equal": [3, 3, 3, 3], "one more": [2, 7, 2, 2]}
    found = _drifts(Copies("dp", group, tuple(checksums), (0, 1, 2, 3)), list(checksums.values()))
    assert found == [Drift("dp", group.ranks, (), ("tie",)), Drift("dp", group.ranks, (2,), ("one", "one more"))]

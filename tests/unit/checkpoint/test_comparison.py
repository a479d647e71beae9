"""Which tensors of two checkpoints differ, where one has states that the other lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalm.checkpoint import comparison

KEYS = ("fp32", "exp_avg", "exp_avg_sq")


def _names(monkeypatch: pytest.MonkeyPatch, first: list[str], second: list[str]) -> list[str]:
    tensors = {"first": first, "second": second}
    monkeypatch.setattr(comparison, "open_checkpoint", lambda path: path)
    monkeypatch.setattr(
        comparison,
        "_tensors",
        lambda source, optimizer: iter([(name, torch.full((2,), float(len(name)))) for name in tensors[source.name]]),
    )
    monkeypatch.setattr(comparison, "_weights", lambda source: {name.split()[0] for name in tensors[source.name]})
    return [found.name for found in comparison.tensor_differences(Path("first"), Path("second"))]


def _with_states(*keys: str) -> list[str]:
    return [name for weight in ("a", "b") for name in (weight, *(f"{weight} {key}" for key in keys))]


@pytest.mark.parametrize("lacking", [KEYS[:1], KEYS[1:], KEYS[1:2], KEYS])
@pytest.mark.parametrize("swapped", [False, True])
def test_states_that_one_side_lacks_are_named_and_no_others(
    lacking: tuple[str, ...], swapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, less = _with_states(*KEYS), _with_states(*(key for key in KEYS if key not in lacking))
    pair = (less, whole) if swapped else (whole, less)
    where = "second" if swapped else "first"
    expected = [f"{weight} {key} (in the {where} alone)" for weight in ("a", "b") for key in lacking]
    assert _names(monkeypatch, *pair) == expected


@pytest.mark.parametrize("swapped", [False, True])
def test_weights_of_one_kind_that_one_side_lacks_are_named_and_no_others(
    swapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without an embedding's LayerNorm and an untied head."""
    whole = [name for weight in ("e", "n.w", "n.b", "h", "head") for name in (weight, *(f"{weight} {k}" for k in KEYS))]
    less = [name for name in whole if not name.startswith(("n.", "head"))]
    where = "second" if swapped else "first"
    expected = [f"{name} (in the {where} alone)" for name in whole if name.startswith(("n.", "head"))]
    assert _names(monkeypatch, *((less, whole) if swapped else (whole, less))) == expected


def test_tensors_larger_than_memory_in_fp64_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary's table of BLOOM-176B has 3.6e9 elements: 29 GB for each result of fp64 that is as large."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (torch.randn(7, 5, generator=generator) for _ in range(2))
    delta, norm = ours.double() - theirs.double(), ours.double().norm().item()
    monkeypatch.setattr(comparison, "BLOCK_ELEMENTS", 4)
    widened: list[int] = []
    double = torch.Tensor.double

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        widened.append(tensor.numel())
        return double(tensor)

    monkeypatch.setattr(torch.Tensor, "double", counted)
    found = comparison._difference("a", ours, theirs)
    assert found is not None
    assert found.largest == delta.abs().max().item()
    assert found.relative == pytest.approx(delta.norm().item() / norm, rel=1e-12)
    assert comparison._difference("a", ours, ours.clone()) is None
    broken = comparison._difference("a", ours, torch.where(ours == ours[3, 3], torch.nan, ours))
    assert broken is not None
    assert broken.largest != broken.largest
    assert max(widened) == 4

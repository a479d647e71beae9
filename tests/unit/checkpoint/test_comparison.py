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

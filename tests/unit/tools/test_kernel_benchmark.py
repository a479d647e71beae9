"""The table of kernels: one row a side, read by the picture's program, and failures that do not end it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import draw, kernels
from benchmarks.kernel_cases.comparison import Comparison, measure
from benchmarks.kernel_cases.operations import comparisons

CPU = torch.device("cpu")


def test_table_has_times_rates_and_small_errors_and_can_be_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kernels.json"
    threads = torch.get_num_threads()
    assert kernels.main(["--device", "cpu", "--only", "rotary", "softmax", "--rounds", "2", "--json", str(path)]) == 0
    torch.set_num_threads(threads)
    found = json.loads(path.read_text())
    assert [row["operation"] for row in found["rows"]] == ["scale + mask + softmax", "rotary"]
    for row in found["rows"]:
        assert row["milliseconds"] > 0
        assert row["rate"].endswith("B/s")
        # fp32 arithmetic relative to the largest value.
        assert row["error"] < 1e-5
    assert "| rotary |" in capsys.readouterr().out
    assert "| rotary | 2 x 4 x 128 x 32 | torch |" in draw.kernel_table(found)


def test_every_operation_of_the_model_is_compared() -> None:
    names = {comparison.operation for comparison in comparisons(CPU)}
    assert {
        "head + cross-entropy",
        "LayerNorm",
        "bias + GELU",
        "bias + SwiGLU",
        "bias + dropout + add",
        "AdamW",
    } <= names


def test_an_update_changes_its_inputs_and_has_no_gradient() -> None:
    (comparison,) = (one for one in comparisons(CPU) if one.operation == "AdamW, clipping")
    row = measure(comparison, "torch fused + copy + zero_", CPU, rounds=1)
    assert row.failure == ""
    assert row.milliseconds > 0
    # fp32 arithmetic relative to the largest value.
    assert row.error is not None
    assert row.error < 1e-6


def test_a_side_that_fails_says_why_and_one_that_is_wrong_shows_its_error() -> None:
    def make(num_rows: int) -> tuple[torch.Tensor, ...]:
        return (torch.ones(num_rows, 2).requires_grad_(),)

    def refuse(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not on this machine\nsecond line")

    sides = {"refuses": refuse, "wrong": lambda x: 1.5 * x, "right": lambda x: 2 * x}
    comparison = Comparison("doubling", "4 x 2", 4, make, sides, lambda x: 2 * x, moved_bytes=64.0)
    rows = {side: measure(comparison, side, CPU, rounds=1) for side in sides}
    assert rows["refuses"].failure == "RuntimeError: not on this machine"
    assert rows["refuses"].milliseconds == 0
    assert rows["wrong"].error == pytest.approx(0.25)
    assert rows["right"].error == 0
    assert "RuntimeError" in kernels.line(rows["refuses"])

"""What the records of a run keep of what was written before it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalm.telemetry.console import Console
from megalm.telemetry.metric_log import read_metric_log
from megalm.topology.group import SOLO
from megalm.train.sinks import open_sinks
from tests.support.steps import step_metrics
from tests.unit.config.arguments import smallest


def go_on(words: list[str], **arguments: Any) -> None:
    """Open the records of a run and write one step."""
    topology: Any = SimpleNamespace(world=SOLO)
    step = arguments["resumed_step"] + 1
    for sink in open_sinks(smallest(*words), topology, Console(True, "error"), **arguments):
        sink.log_step(step_metrics(step))
        sink.close()


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metric_log(path) if record["kind"] == "train"]


def test_evaluating_an_earlier_checkpoint_takes_nothing_out_of_the_records(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    words = ["--metrics-path", str(tmp_path / "metrics.jsonl"), "--tensorboard-dir", str(tmp_path / "board")]
    for step in range(4):
        go_on(words, resumed_step=step)
    go_on([*words, "--load", str(tmp_path), "--eval-only"], resumed_step=1)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 2]
    assert not list(tmp_path.rglob("*discarded*"))
    go_on(words, resumed_step=1)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert (tmp_path / "metrics.jsonl.discarded").exists()
    assert list((tmp_path / "board").glob("*discarded*"))

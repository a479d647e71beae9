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
    arguments = {"continues_save": True, **arguments}
    for sink in open_sinks(smallest(*words), topology, Console(True, "warning"), **arguments):
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


def test_records_of_another_run_are_set_aside_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that goes on from a checkpoint elsewhere, into a folder with records and no checkpoint."""
    path = tmp_path / "metrics.jsonl"
    words = ["--save", str(tmp_path)]
    for number in (1, 2):
        for step in range(3):
            go_on(words, resumed_step=step, continues_save=step > 0)
        go_on(words, resumed_step=2, continues_save=False)
        assert steps(path) == [3]
        assert steps(tmp_path / f"metrics.jsonl.{number}") == [1, 2, 3]
        said = capsys.readouterr().err
        assert f"goes on from a checkpoint elsewhere: it is metrics.jsonl.{number} now" in said
        path.write_text("")
    # Started again before its first checkpoint: step 3 will happen again, and nothing in the file is of another run.
    for _ in range(2):
        go_on(words, resumed_step=2, continues_save=False)
    assert steps(path) == [3]
    assert not (tmp_path / "metrics.jsonl.3").exists()


@pytest.mark.parametrize(
    "words, continues_save",
    [(["--save", "{}"], True), (["--save", "{}/new", "--metrics-path", "{}/metrics.jsonl"], False)],
)
def test_records_that_a_run_continues_or_names_stay(words: list[str], continues_save: bool, tmp_path: Path) -> None:
    words = [word.format(tmp_path) for word in words]
    for step in range(3):
        go_on(words, resumed_step=step)
    go_on(words, resumed_step=2, continues_save=continues_save)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert not (tmp_path / "metrics.jsonl.1").exists()


def test_a_wandb_run_of_another_training_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed: list[bool] = []

    def sink(*_: Any, **arguments: Any) -> Any:
        resumed.append(arguments["resumed"])
        return SimpleNamespace(log_step=lambda m: None, close=lambda: None)

    monkeypatch.setattr("megalm.train.sinks.WandbSink", sink)
    words = ["--save", str(tmp_path), "--wandb-project", "project"]
    for step in range(3):
        go_on(words, resumed_step=step)
    go_on(words, resumed_step=2, continues_save=False)
    go_on(words, resumed_step=3)
    assert resumed == [False, True, True, False, True]

"""TensorBoard and W&B records, read back."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megalm.errors import ConfigError
from megalm.telemetry.metrics import Sink, TensorBoardSink, WandbSink
from tests.support.steps import step_metrics


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_scalars_have_the_tags_of_blooms_logs(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, queue_size=10)
    sink.log_step(step_metrics(1, loss=6.5, lr=0.25, loss_scale=1024.0, global_batch_size=8))
    sink.log_step(step_metrics(2, loss=6.25, lr=0.5))
    sink.log_validation(2, 16, "valid", 6.75)
    sink.log_validation(2, 16, "french", 7.5)
    sink.log_validation(2, 16, "test", 7.0)
    sink.close()
    found = scalars(tmp_path)
    # Values with few binary digits, since TensorBoard keeps fp32.
    assert found["lm-loss-training/lm loss"] == [(1, 6.5), (2, 6.25)]
    assert found["lm-loss-training/lm loss vs samples"] == [(8, 6.5), (16, 6.25)]
    assert found["lm-loss-training/lm loss vs tokens"] == [(1024, 6.5), (2048, 6.25)]
    assert found["learning-rate/learning-rate"] == [(1, 0.25), (2, 0.5)]
    assert found["loss-scale/loss-scale"] == [(1, 1024.0)]
    assert found["batch-size/batch-size"] == [(1, 8.0)]
    assert found["steps-vs-samples/y=samples,x=steps"] == [(1, 8.0), (2, 16.0)]
    assert found["lm-loss-validation/lm loss validation"] == [(2, 6.75)]
    assert found["lm-loss-validation/lm loss validation vs samples"] == [(16, 6.75)]
    assert found["lm-loss-validation/french/lm loss validation"] == [(2, 7.5)]
    assert found["lm-loss-validation/lm loss test"] == [(2, 7.0)]
    # exp(6.75) rounded to fp32.
    assert found["lm-loss-validation/lm loss validation ppl"] == [(2, pytest.approx(math.exp(6.75), rel=1e-7))]
    assert {"grad-norm/grad-norm", "iteration-time/iteration-time"} <= set(found)


@pytest.mark.parametrize("resume_step", [2, 4, 6, 9])
def test_a_run_that_goes_on_from_an_earlier_step_shows_each_step_once(tmp_path: Path, resume_step: int) -> None:
    """x is 8 times as large against samples, and 1024 times against tokens: no bound of one is one of the others."""
    resumed, straight = tmp_path / "resumed", tmp_path / "straight"
    write_events(resumed, 1, 4)
    write_events(resumed, 5, 9, resume_step=4)
    write_events(resumed, resume_step + 1, 12, resume_step=resume_step, loss=2.0)
    write_events(straight, 1, resume_step)
    write_events(straight, resume_step + 1, 12, loss=2.0)
    # Sorted, as files of one second are read in any order.
    found, expected = ({tag: sorted(points) for tag, points in scalars(f).items()} for f in (resumed, straight))
    assert found == expected
    assert found["lm-loss-training/lm loss vs samples"] == [
        (8 * step, 2.0 if step > resume_step else 1.0) for step in range(1, 13)
    ]


def test_a_cut_off_end_is_an_event_file_of_its_own(tmp_path: Path) -> None:
    write_events(tmp_path / "run", 1, 9)
    for _ in range(2):
        write_events(tmp_path / "run", 6, 9, resume_step=5)
    (tmp_path / "seen").mkdir()
    aside = sorted((tmp_path / "run").glob("*discarded*"))
    assert len(aside) == 2
    for path in aside:
        path.rename(tmp_path / "seen" / path.name.replace("discarded", "tfevents"))
    steps = [step for step, _ in scalars(tmp_path / "seen")["lm-loss-training/lm loss"]]
    assert steps == [6, 7, 8, 9] * 2


def test_events_of_other_programs_and_of_a_process_that_was_killed_stay(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    writer = tensorboard.SummaryWriter(str(tmp_path), filename_suffix=".other")
    writer.add_scalar("accuracy", 0.5, 100)
    writer.close()
    write_events(tmp_path, 1, 9)
    (killed,) = (path for path in tmp_path.glob("*tfevents*") if not path.name.endswith(".other"))
    killed.write_bytes(killed.read_bytes()[:-5])
    write_events(tmp_path, 5, 6, resume_step=4)
    assert scalars(tmp_path)["accuracy"] == [(100, 0.5)]
    assert [step for step, _ in scalars(tmp_path)["lm-loss-training/lm loss"]] == [1, 2, 3, 4, 5, 6]


def write_events(folder: Path, first: int, last: int, *, resume_step: int | None = None, loss: float = 1.0) -> None:
    sink = TensorBoardSink(folder, resume_step=resume_step)
    for step in range(first, last + 1):
        sink.log_step(step_metrics(step, loss=loss))
        if step % 2 == 0:
            sink.log_validation(step, 8 * step, "valid", loss)
    sink.close()


def test_tensorboard_folder_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="TensorBoard folder .*file/events cannot be written"):
        TensorBoardSink(tmp_path / "file" / "events")


def wandb_sink(folder: Path) -> WandbSink:
    return WandbSink("project", None, mode="offline", folder=folder, config={})


@pytest.mark.parametrize("make, package", [(TensorBoardSink, "tensorboard"), (wandb_sink, "wandb")])
def test_missing_package_is_named_with_the_way_to_install_it(
    make: Callable[[Path], Sink], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> ModuleType:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ConfigError, match=rf"needs the package {package}.*\n  pip install 'megalm\[tracking\]'"):
        make(tmp_path)


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = False

    def log(self, values: dict[str, Any], *, step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished = True


def test_wandb_run_gets_the_configuration_and_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    run = FakeRun()
    asked: dict[str, Any] = {}

    def init(**arguments: Any) -> FakeRun:
        asked.update(arguments)
        return run

    monkeypatch.setattr(wandb, "init", init)
    sink = WandbSink("project", "name", mode="offline", folder=tmp_path / "new", config={"model": {"num_layers": 2}})
    sink.log_step(step_metrics(3, loss=6.5))
    sink.log_validation(3, 24, "valid", 6.75)
    sink.log_validation(3, 24, "french", 7.5)
    sink.close()
    assert (asked["project"], asked["name"]) == ("project", "name")
    assert asked["mode"] == "offline"
    assert asked["config"] == {"model": {"num_layers": 2}}
    assert Path(asked["dir"]).is_dir()
    train, valid, french = run.logged
    assert train[1] == 3
    assert train[0]["train/loss"] == 6.5
    assert train[0]["train/consumed_samples"] == 24
    assert valid == ({"valid/loss": 6.75, "valid/perplexity": math.exp(6.75)}, 3)
    assert french[0]["valid/french/loss"] == 7.5
    assert run.finished


def test_a_resumed_training_goes_on_in_its_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    asked: list[tuple[str | None, str | None]] = []

    def init(**arguments: Any) -> FakeRun:
        asked.append((arguments["id"], arguments["resume"]))
        return FakeRun()

    monkeypatch.setattr(wandb, "init", init)
    for mode, resumed in (("online", True), ("online", True), ("offline", True), ("online", False)):
        WandbSink("project", None, mode=mode, folder=tmp_path, config={}, resumed=resumed)
    first, again, offline, other = asked
    assert first[0] == again[0] == offline[0] != other[0]
    assert [resume for _, resume in asked] == ["allow", "allow", None, None]
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    WandbSink("project", None, mode="online", folder=tmp_path, config={}, resumed=True)
    assert asked[-1] == (None, "allow")


@pytest.mark.slow
def test_wandb_offline_run_leaves_a_record_and_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    sink = WandbSink("project", None, mode="offline", folder=tmp_path, config={"seed": 1})
    sink.log_step(step_metrics(1))
    sink.close()
    records = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(records) == 1
    assert records[0].stat().st_size > 0
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")

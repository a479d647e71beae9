"""The picture of a run, by what is in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megalm.errors import ConfigError, DataError
from megalm.telemetry import plot
from megalm.telemetry.metrics import JsonlSink
from tests.support.steps import step_metrics

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def metrics_path(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    for first, last, resume_step in ((1, 70, 0), (61, 120, 60)):
        sink = JsonlSink(path, resume_step=resume_step)
        for step in range(first, last + 1):
            sink.log_step(step_metrics(step, loss=3 + 6 / step))
            if step % 20 == 0:
                sink.log_validation(step, 8 * step, "valid", 3.1 + 6 / step)
        sink.close()
    return path


def test_curve_holds_each_step_once_and_where_the_run_was_resumed(metrics_path: Path) -> None:
    curve = plot.read_curve(metrics_path)
    assert list(curve.train) == list(range(1, 121))
    assert list(curve.valid["valid"]) == [20, 40, 60, 80, 100, 120]
    assert curve.resumed_at == [60]


def test_picture_has_both_curves_the_entropy_and_the_resume_in_named_units(metrics_path: Path) -> None:
    figure = plot._draw(plot.read_curve(metrics_path), 6.5)
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        "training, mean of 3 steps",
        "validation, last 3.150",
        "unigram entropy of the validation tokens, 6.500",
        "resumed from a checkpoint",
    ]
    assert axes.get_ylabel() == "loss (nats per token)"
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["resumed from a checkpoint"].get_xdata()) == [60, 60]
    assert list(lines["unigram entropy of the validation tokens, 6.500"].get_ydata()) == [6.5, 6.5]
    assert len(lines["training, mean of 3 steps"].get_xdata()) == 120


def test_picture_is_written_whole_as_png(metrics_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "loss.png"
    plot.plot_curve(metrics_path, out, unigram_entropy=6.5)
    assert out.read_bytes().startswith(b"\x89PNG\r\n")
    assert [path.name for path in out.parent.iterdir()] == ["loss.png"]


def test_one_step_without_validation_is_drawn(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log_step(step_metrics(1))
    sink.close()
    plot.plot_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png", unigram_entropy=None)
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_record_without_a_finite_loss_is_refused(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log_step(step_metrics(1, loss=float("nan")))
    sink.close()
    with pytest.raises(DataError, match="holds no loss to draw"):
        plot.plot_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_picture_that_cannot_be_written_is_a_config_error(metrics_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"picture .*metrics.jsonl/loss.png cannot be written"):
        plot.plot_curve(metrics_path, metrics_path / "loss.png")


def test_smoothing_keeps_a_straight_line_and_its_start() -> None:
    line = [float(i) for i in range(20)]
    assert plot.smooth(line, window=5)[:-2] == line[:-2]
    assert plot.smooth([9.0, 3.0, 3.0, 3.0], window=3) == [9.0, 5.0, 3.0, 3.0]


def test_plot_tool_writes_the_picture_and_reports_a_missing_record(metrics_path: Path, tmp_path: Path) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "plot_run.py")]
    done = subprocess.run([*tool, metrics_path, tmp_path / "a.png"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'a.png'}\n")
    failed = subprocess.run([*tool, tmp_path / "none", tmp_path / "b.png"], capture_output=True, text=True, check=False)
    assert failed.returncode == DataError.exit_code
    assert failed.stderr.startswith("DataError: there is no metrics file")

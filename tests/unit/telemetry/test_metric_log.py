"""The JSON-lines record: exact, append-only, and rewound by a resume."""

from __future__ import annotations

import errno
import io
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from megalm.errors import ConfigError, DataError
from megalm.telemetry.metric_log import MetricLog, read_metric_log
from megalm.telemetry.metrics import JsonlSink
from tests.support.steps import step_metrics


def write_steps(path: Path, first: int, last: int, *, resume_step: int | None = None) -> None:
    sink = JsonlSink(path, resume_step=resume_step)
    for step in range(first, last + 1):
        sink.log_step(step_metrics(step, loss=10 / 3 / step))
        if step % 2 == 0:
            sink.log_validation(step, 8 * step, "valid", 0.1 + step)
    sink.close()


def kinds_and_steps(path: Path) -> list[tuple[str, int]]:
    return [(record["kind"], record["step"]) for record in read_metric_log(path)]


def test_every_line_is_one_json_object_with_the_loss_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    write_steps(path, 1, 2)
    train, _, valid = (json.loads(line) for line in path.read_text().splitlines())
    assert train["kind"] == "train"
    assert float.fromhex(train["loss_hex"]) == train["loss"] == 10 / 3
    assert (train["consumed_samples"], train["tokens_per_second"], train["skipped"]) == (8, 5120.0, False)
    assert valid == {
        "kind": "valid",
        "step": 2,
        "consumed_samples": 16,
        "name": "valid",
        "loss": 2.1,
        "loss_hex": (2.1).hex(),
    }


def test_line_is_readable_before_the_sink_is_closed(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log_step(step_metrics(1))
    assert kinds_and_steps(tmp_path / "metrics.jsonl") == [("train", 1)]
    sink.close()


class FillingFile(io.FileIO):
    """Takes half a record and then nothing, until there is room."""

    full = False

    def write(self, data: Any) -> int:
        if not self.full:
            return super().write(data)
        if len(data) < 150:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data[: len(data) - 100])


def test_records_that_a_full_disk_refuses_wait_and_are_written_in_order_when_there_is_room(tmp_path: Path) -> None:
    path, warnings = tmp_path / "metrics.jsonl", list[str]()
    log = MetricLog(path, warn=warnings.append)
    log._file.close()
    log._file = file = FillingFile(path, "a")
    for step in range(1, 9):
        file.full = 3 <= step <= 5
        log.append({"kind": "train", "step": step, "note": "x" * 200})
        assert path.read_text() == "" or path.read_text().endswith("\n")
        last = 2 if file.full else step
        assert [number for _, number in kinds_and_steps(path)] == list(range(1, last + 1))
    log.close()
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]


def test_numbers_that_json_lacks_are_null_beside_their_hex(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log_step(step_metrics(1, loss=math.nan, grad_norm=math.inf))
    sink.close()
    (record,) = read_metric_log(tmp_path / "metrics.jsonl")
    assert record["loss"] is None
    assert record["loss_hex"] == "nan"
    assert record["grad_norm"] is None


def test_resume_takes_back_what_will_happen_again_and_keeps_it_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 5)
    write_steps(path, 4, 4, resume_step=3)
    assert kinds_and_steps(path) == [
        ("train", 1),
        ("train", 2),
        ("valid", 2),
        ("train", 3),
        ("resume", 3),
        ("train", 4),
        ("valid", 4),
    ]
    discarded = tmp_path / "metrics.jsonl.discarded"
    assert kinds_and_steps(discarded) == [("train", 4), ("valid", 4), ("train", 5)]


def test_resume_at_the_last_step_changes_no_earlier_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 4)
    before = path.read_bytes()
    write_steps(path, 5, 6, resume_step=4)
    assert path.read_bytes().startswith(before)
    assert not (tmp_path / "metrics.jsonl.discarded").exists()


def test_a_long_record_is_taken_back_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"kind": "train", "step": 1, "loss": 2.0, "comment": "x" * 900}) + "\n"
    path.write_text(line * 10_000)
    tracemalloc.start()
    try:
        MetricLog(path, resume_step=1).close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000  # of 9.5 MB, of which there were three copies
    assert len(path.read_text().splitlines()) == 10_001


def test_line_cut_short_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3)
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert kinds_and_steps(path)[-1] == ("train", 3)
    write_steps(path, 4, 4, resume_step=None)
    assert kinds_and_steps(path)[-2:] == [("train", 4), ("valid", 4)]


def test_file_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("a shopping list\n")
    with pytest.raises(DataError, match=r"line 1 of .*notes.txt is not a record of metrics: 'a shopping list'"):
        JsonlSink(path, resume_step=3)
    assert path.read_text() == "a shopping list\n"


def test_unwritable_path_is_a_config_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"metrics file .*file/metrics.jsonl cannot be written"):
        JsonlSink(tmp_path / "file" / "metrics.jsonl")


def test_missing_file_is_a_data_error_that_says_where_one_comes_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no metrics file .*\n.*<save>/metrics.jsonl"):
        list(read_metric_log(tmp_path / "metrics.jsonl"))

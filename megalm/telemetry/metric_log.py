"""The JSON-lines record of a run: what is appended, what a resume takes back, and how it is read.

Every line is one object with `kind` and `step`. `train` lines carry the fields of StepMetrics, `valid` lines a `name`
and a `loss`, `resume` lines mark the step that a run continued from. `loss_hex` holds the loss bit for bit; numbers
that JSON cannot write (nan, inf) are null beside it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megalm.errors import ConfigError, DataError
from megalm.telemetry.aside import free_name


class MetricLog:
    """Appends records to a file, each on disk's way before the next step.

    A disk that is full is no reason to stop a run that can still train: what it does not take waits in memory for the
    next append, and the file ends with a whole line at all times.
    """

    def __init__(
        self, path: str | Path, *, resume_step: int | None = None, warn: Callable[[str], None] = print
    ) -> None:
        """Open for append. With `resume_step`, records past it are first moved to `<path>.discarded`.

        `warn` hears, once, that a record could not be written.
        Raises: ConfigError if the file cannot be written; DataError if it exists and holds something else.
        """
        self.path = Path(path)
        self._warn = warn
        self._waiting: list[bytes] = []
        self._has_warned = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                _take_back(self.path, math.inf if resume_step is None else resume_step)
            self._file = open(self.path, "ab", buffering=0)
        except OSError as failure:
            raise ConfigError(
                f"the metrics file {self.path} cannot be written: {failure.strerror}\n"
                "  set by --metrics-path, or metrics.jsonl in the folder of --save; name a file in a writable folder"
            ) from failure
        if resume_step:
            self.append({"kind": "resume", "step": resume_step})

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record, after those that wait, and hand it to the operating system."""
        self._waiting.append((json.dumps(_jsonable(record), allow_nan=False) + "\n").encode())
        self._write_waiting()

    def close(self) -> None:
        """Try once more to write what waits."""
        self._write_waiting()
        self._file.close()

    def _write_waiting(self) -> None:
        end = self._file.tell()
        try:
            while self._waiting:
                rest = memoryview(self._waiting[0])
                while rest:
                    rest = rest[self._file.write(rest) :]
                del self._waiting[0]
                end = self._file.tell()
        except OSError as failure:
            self._file.truncate(end)  # no half line for the next record to be appended to
            self._file.seek(end)
            if not self._has_warned:
                self._warn(f"metrics wait in memory, as {self.path} cannot be written: {failure.strerror}")
            self._has_warned = True


def read_metric_log(path: str | Path) -> Iterator[dict[str, Any]]:
    """Every record in order. A last line that a crash cut short is left out.

    Raises: DataError if the file is missing or a whole line is not a record.
    """
    for _, record in _whole_lines(Path(path)):
        yield record


def set_aside(path: Path, first_step: int) -> Path | None:
    """Rename a file that has steps from before `first_step`: a run that begins there has not made them.

    Returns the new name; None if there is nothing of the kind. What comes later is for `MetricLog` to take back.
    Raises: DataError if the file holds something else; ConfigError if it cannot be renamed.
    """
    if not path.exists():
        return None
    if not any(record["step"] < first_step and record["kind"] != "resume" for _, record in _whole_lines(path)):
        return None
    aside = free_name(path)
    try:
        path.rename(aside)
    except OSError as failure:
        raise ConfigError(
            f"the metrics file {path} is of another run and cannot be renamed: {failure.strerror}\n"
            "  move it away, or give another --save or --metrics-path"
        ) from failure
    return aside


def _take_back(path: Path, last_step: float) -> None:
    """Move what happened after `last_step` out of the record, since it will happen again, and drop a line cut short."""
    discarded: list[str] = []
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("w", encoding="utf-8", newline="\n") as file:
            for line, record in _whole_lines(path):
                if record["step"] <= last_step:
                    file.write(line)
                else:
                    discarded.append(line)
            file.flush()
            os.fsync(file.fileno())
    except DataError:
        beside.unlink()
        raise
    if discarded:
        with path.with_name(path.name + ".discarded").open("a", encoding="utf-8") as file:
            file.writelines(discarded)
    os.replace(beside, path)


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines with their records, one in memory at a time: a long run has hundreds of megabytes of them."""
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith("\n"):
                    return
                yield line, _record_in(line, number, path)
    except FileNotFoundError:
        raise DataError(f"there is no metrics file {path}\n  a run writes one as <save>/metrics.jsonl") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}\n  a run writes one as <save>/metrics.jsonl") from error


def _record_in(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(line)
        if not isinstance(record["step"], int) or not isinstance(record["kind"], str):
            raise TypeError
    except (ValueError, TypeError, KeyError):
        raise DataError(
            f"line {number} of {path} is not a record of metrics: {line.strip()[:80]!r}\n"
            "  every line is a JSON object with kind and step; move the file away or remove the line"
        ) from None
    return record


def _jsonable(record: Mapping[str, Any]) -> dict[str, Any]:
    written = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    if "loss" in record:
        written["loss_hex"] = float(record["loss"]).hex()
    return written

from __future__ import annotations

import io

import pytest

from megalm.data import meter
from megalm.data.meter import Meter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def read(stream: io.StringIO, seconds: list[float], monkeypatch: pytest.MonkeyPatch) -> str:
    """What is shown of 400 MB, 100 at each of these moments after the start."""
    moments = iter([0.0, *seconds])
    monkeypatch.setattr(meter.time, "monotonic", lambda: next(moments))
    shown = Meter("c", 400_000_000, stream=stream)
    for _ in seconds:
        shown(100_000_000)
    shown.close()
    return stream.getvalue()


def test_what_takes_a_moment_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(io.StringIO(), [0.1, 0.5, 0.9], monkeypatch) == ""


def test_a_line_every_few_seconds_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    said = read(io.StringIO(), [2.0, 4.0, 8.0], monkeypatch)
    assert said == "c:  25% | 50 MB/s | ETA 0:06\nc:  75% | 38 MB/s | ETA 0:02\n"


def test_one_line_that_is_redrawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    said = read(Terminal(), [2.0, 4.0], monkeypatch)
    assert said.split("\r\x1b[K") == ["", "c:  25% | 50 MB/s | ETA 0:06", "c:  50% | 50 MB/s | ETA 0:04", ""]

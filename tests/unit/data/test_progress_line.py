from __future__ import annotations

import io

import pytest

from megalm.data.preprocess import Progress
from megalm.data.progress_line import ProgressLine, bar, describe


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


HALF = Progress(8_000_000, 4_000_000, documents=5_000, tokens=1_000_000, seconds=2.0)


def test_line_names_rates_and_the_time_that_is_left() -> None:
    assert describe(HALF) == " 50 % | 2.0 MB/s | 2,500 documents/s | 0.50 Mtok/s | ETA 0:02"
    slow = Progress(8_000_000_000, 1_000_000_000, seconds=1000.0, skipped=3)
    assert describe(slow).endswith("ETA 1:56:40 | 3 lines skipped")


@pytest.mark.parametrize("progress", [Progress(0), Progress(10), Progress(10, 10), Progress(10, 11, seconds=1.0)])
def test_nothing_and_everything_done_are_shown(progress: Progress) -> None:
    assert "ETA 0:00" in describe(progress)
    assert len(bar(progress)) == 20


def test_terminal_gets_one_line_with_a_bar_and_a_file_lines() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        line = ProgressLine(stream)
        line(HALF)
        line(HALF)  # Too early to show again.
        line.close()
    assert terminal.getvalue() == f"\r\x1b[K{'█' * 10}{'░' * 10} {describe(HALF)}\r\x1b[K"
    assert file.getvalue() == describe(HALF) + "\n"


def test_log_interval_counts_documents() -> None:
    file = io.StringIO()
    line = ProgressLine(file, every_documents=1000)
    for documents in range(0, 3001, 250):
        line(Progress(1, documents=documents))
    assert file.getvalue().count("\n") == 3

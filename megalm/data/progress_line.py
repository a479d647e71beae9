"""The line that shows how far a tokenization is."""

from __future__ import annotations

import time
from typing import TextIO

from megalm.data.preprocess import Progress

CELLS = 20


class ProgressLine:
    """Redraws one line on a terminal; prints a line now and then elsewhere."""

    def __init__(self, stream: TextIO, *, every_documents: int | None = None) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._every_documents = every_documents
        self._shown_at = 0.0
        self._shown_documents = 0

    def __call__(self, progress: Progress) -> None:
        """Show the progress if it is time to."""
        now = time.monotonic()
        if self._every_documents is not None and not self._terminal:
            due = progress.documents - self._shown_documents >= self._every_documents
        else:
            due = now - self._shown_at > (0.2 if self._terminal else 5.0)
        if not due:
            return
        self._shown_at, self._shown_documents = now, progress.documents
        line = describe(progress)
        self._stream.write(f"\r\x1b[K{bar(progress)} {line}" if self._terminal else line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Leave the terminal's line."""
        if self._terminal and self._shown_at:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def describe(progress: Progress) -> str:
    """`43 % | 12.1 MB/s | 4,310 documents/s | 3.4 Mtok/s | ETA 0:12`; megabytes are those of the files."""
    seconds = max(progress.seconds, 1e-9)
    share = _share(progress)
    left = seconds * (1 - share) / share if share > 0 else 0.0
    parts = [
        f"{100 * share:3.0f} %",
        f"{progress.done_bytes / seconds / 1e6:.1f} MB/s",
        f"{progress.documents / seconds:,.0f} documents/s",
        f"{progress.tokens / seconds / 1e6:.2f} Mtok/s",
        f"ETA {_clock(int(left))}",
    ]
    if progress.skipped:
        parts.append(f"{progress.skipped} lines skipped")
    return " | ".join(parts)


def bar(progress: Progress) -> str:
    """The share that is done as a picture of twenty cells."""
    done = int(CELLS * _share(progress))
    return "█" * done + "░" * (CELLS - done)


def _share(progress: Progress) -> float:
    return min(1.0, progress.done_bytes / progress.total_bytes) if progress.total_bytes else 1.0


def _clock(seconds: int) -> str:
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"

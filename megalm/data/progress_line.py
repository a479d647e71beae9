"""The line that shows how far a tokenization is."""

from __future__ import annotations

import time
from typing import TextIO

from megalm.data.preprocess import Progress


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
        end = "" if self._terminal else "\n"
        start = "\r\x1b[K" if self._terminal else ""
        self._stream.write(start + describe(progress) + end)
        self._stream.flush()

    def close(self) -> None:
        """Leave the terminal's line."""
        if self._terminal and self._shown_at:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def describe(progress: Progress) -> str:
    """`43 % | 12.1 MB/s | 4,310 documents/s | 3.4 Mtok/s | ETA 0:12`."""
    seconds = max(progress.seconds, 1e-9)
    share = progress.done_bytes / progress.total_bytes if progress.total_bytes else 1.0
    left = seconds * (1 - share) / share if share > 0 else 0.0
    parts = [
        f"{100 * share:3.0f} %",
        f"{progress.done_bytes / seconds / 1e6:.1f} MB/s",
        f"{progress.documents / seconds:,.0f} documents/s",
        f"{progress.tokens / seconds / 1e6:.2f} Mtok/s",
        f"ETA {int(left) // 60}:{int(left) % 60:02d}",
    ]
    if progress.skipped:
        parts.append(f"{progress.skipped} lines skipped")
    return " | ".join(parts)

"""How far a tool has read, where that takes more than a moment."""

from __future__ import annotations

import sys
import time
from typing import TextIO

SECONDS_BEFORE_FIRST = 1.0
SECONDS_BETWEEN = 5.0
SECONDS_BETWEEN_ON_TERMINAL = 0.2


class Meter:
    """`label: 43 % | 812 MB/s | ETA 0:12`: a line that is redrawn on a terminal, elsewhere one every few seconds."""

    def __init__(self, label: str, total_bytes: int, *, stream: TextIO | None = None) -> None:
        self._label = label
        self._total = total_bytes
        self._stream = sys.stderr if stream is None else stream
        self._on_terminal = self._stream.isatty()
        self._done = 0
        self._started = time.monotonic()
        self._due = self._started + SECONDS_BEFORE_FIRST
        self._drawn = False

    def __call__(self, num_bytes: int) -> None:
        """So many bytes more have been read."""
        self._done += num_bytes
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + (SECONDS_BETWEEN_ON_TERMINAL if self._on_terminal else SECONDS_BETWEEN)
        start, end = ("\r\x1b[K", "") if self._on_terminal else ("", "\n")
        self._stream.write(start + self._line(now - self._started) + end)
        self._stream.flush()
        self._drawn = True

    def close(self) -> None:
        """Leave the terminal's line empty."""
        if self._on_terminal and self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _line(self, seconds: float) -> str:
        left = seconds * (self._total - self._done) / max(self._done, 1)
        return (
            f"{self._label}: {self._done / max(self._total, 1):4.0%} | {self._done / seconds / 1e6:,.0f} MB/s | "
            f"ETA {int(left) // 60}:{int(left) % 60:02d}"
        )

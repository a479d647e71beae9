"""The line that shows how far a tool is, in bytes."""

from __future__ import annotations

import time
from threading import Lock
from typing import TextIO


class ByteLine:
    """Redraws one line on a terminal, `verifying  43 % | 12.1 / 28.0 MB | 310 MB/s`; silent elsewhere.

    Threads may call it at the same time.
    """

    def __init__(self, stream: TextIO, doing: str) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._doing = doing
        self._lock = Lock()
        self._started = time.monotonic()
        self._shown_at = 0.0
        self._done = 0

    def __call__(self, count: int, total: int, what: str = "") -> None:
        """Add `count` bytes of `total`, 0 where that is not known; `what` names them."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if not self._terminal or now - self._shown_at < 0.1:
                return
            self._shown_at = now
            self._stream.write("\r\x1b[K" + self._text(total, now - self._started, what))
            self._stream.flush()

    def pause(self) -> None:
        """Leave the line empty, for something else to be printed there."""
        if self._terminal and self._shown_at:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def close(self) -> None:
        """Leave the line empty, and begin anew."""
        self.pause()
        self._shown_at, self._done, self._started = 0.0, 0, time.monotonic()

    def _text(self, total: int, seconds: float, what: str) -> str:
        done = f"{self._done / 1e6:,.1f} / {total / 1e6:,.1f} MB" if total else f"{self._done / 1e6:,.1f} MB"
        parts = [f"{100 * self._done / total:3.0f} %"] if total else []
        parts += [done, f"{self._done / max(seconds, 1e-3) / 1e6:,.0f} MB/s"]
        return f"{self._doing}  {' | '.join(parts)}  {what:.60}"

"""Lines for the person who watches, from one process."""

from __future__ import annotations

import shutil
import sys
from typing import TextIO

LEVELS = ("debug", "info", "warning", "error")
PREFIX = "[megalm] "
_ERASE_LINE = "\r\x1b[K"


class Console:
    """Prints `[megalm] ...` lines on rank zero, and nothing on any other rank.

    Debug, info and progress go to standard output, warnings and errors to standard error. On a terminal the newest
    progress line stays in place and is overwritten by the next one; everywhere else only the lines to keep appear.
    """

    def __init__(self, rank_zero: bool, level: str = "info") -> None:
        if level not in LEVELS:
            raise ValueError(f"level = {level!r} must be one of {', '.join(LEVELS)}")
        self._rank_zero = rank_zero
        self._least = LEVELS.index(level)
        self._live = False

    def debug(self, message: str) -> None:
        self._print("debug", message, sys.stdout)

    def info(self, message: str) -> None:
        self._print("info", message, sys.stdout)

    def warning(self, message: str) -> None:
        self._print("warning", f"warning: {message}", sys.stderr)

    def error(self, message: str) -> None:
        self._print("error", f"error: {message}", sys.stderr)

    def progress(self, line: str, *, keep: bool) -> None:
        """Show where the run is; with `keep`, the line stays in the log."""
        if not self._shows("info"):
            return
        if keep:
            self._print("info", line, sys.stdout)
        elif sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            sys.stdout.write(_ERASE_LINE + (PREFIX + line)[:width])
            sys.stdout.flush()
            self._live = True

    def _shows(self, level: str) -> bool:
        return self._rank_zero and LEVELS.index(level) >= self._least

    def _print(self, level: str, message: str, stream: TextIO) -> None:
        if not self._shows(level):
            return
        if self._live:
            sys.stdout.write(_ERASE_LINE)
            sys.stdout.flush()
            self._live = False
        stream.write("".join(f"{PREFIX}{line}\n" for line in message.splitlines() or [""]))
        stream.flush()

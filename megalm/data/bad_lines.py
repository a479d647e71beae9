"""The list of what was left out of a corpus."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any


def shown(place: Mapping[str, int]) -> str:
    """`line 3, byte 170`."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in place.items())


class BadLines:
    """`PREFIX.bad_lines.jsonl`, written as the work goes on, so that a list of any length needs no memory."""

    def __init__(self, output_prefix: str) -> None:
        self._path = Path(f"{output_prefix}.bad_lines.jsonl")
        self._scratch = Path(f"{output_prefix}.bad_lines.tmp")
        self._file: IO[bytes] | None = None

    def open(self, size: int) -> None:
        """Go on after the first `size` bytes of an earlier attempt."""
        if not size:
            self._remove_scratch()
            return
        self._file = self._scratch.open("r+b")
        self._file.truncate(size)
        self._file.seek(size)

    def add(self, entry: Mapping[str, Any]) -> None:
        """List one."""
        if self._file is None:
            self._scratch.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._scratch.open("wb")
        self._file.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

    def flush(self) -> int:
        """Bring the list to the disk; returns its bytes."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def publish(self, size: int) -> None:
        """Give the list of `size` bytes its name, which may be done again; an empty one removes that of another run."""
        if self._file is not None:
            self._file.close()
        if not size:
            self._path.unlink(missing_ok=True)
        elif self._scratch.exists():
            os.replace(self._scratch, self._path)

    def abort(self, *, keep: bool) -> None:
        """Close, and remove the list unless it is to be resumed."""
        if self._file is not None:
            self._file.close()
        if not keep:
            self._remove_scratch()

    def _remove_scratch(self) -> None:
        if self._scratch.exists():
            self._scratch.unlink()

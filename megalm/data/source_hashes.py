"""sha256 of the files that a corpus was made of."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Any

from megalm.data.inputs import Position, Source
from megalm.errors import DataError

PIECE = 1 << 20


class SourceHashes:
    """Computed beside the work, in a thread of its own: hashing holds no interpreter lock.

    Of a plain file of which a part is read, that part is hashed; other files whole.
    """

    def __init__(self, sources: Sequence[Source], start: Position, stop: Position) -> None:
        self._ranges = []
        for number in range(start.source, min(stop.source + 1, len(sources))):
            source = sources[number]
            begin = start.offset if number == start.source else 0
            end = stop.offset if number == stop.source else None
            if end != 0:
                plain = not source.compression and source.format != "parquet"
                self._ranges.append((source, begin if plain else 0, end if plain else None))
        self._found: list[dict[str, Any]] = []
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._running = False

    def _run(self) -> None:
        try:
            for source, begin, end in self._ranges:
                entry = {"path": str(source.path), "bytes": source.size_bytes, "sha256": _sha256(source, begin, end)}
                if begin or end is not None:
                    entry["from_byte"], entry["to_byte"] = begin, source.size_bytes if end is None else end
                self._found.append(entry)
        except OSError as error:
            self._error = error

    def start(self) -> None:
        """Begin, once the workers are forked; later calls do nothing."""
        if not self._running:
            self._running = True
            self._thread.start()

    def get(self) -> list[dict[str, Any]]:
        """Wait for the descriptions of the sources."""
        self.start()
        self._thread.join()
        if self._error is not None:
            raise DataError(f"cannot read {self._error.filename} again: {self._error.strerror}")
        return self._found


def _sha256(source: Source, begin: int, end: int | None) -> str:
    digest = hashlib.sha256()
    left = (source.size_bytes if end is None else end) - begin
    with source.path.open("rb") as file:
        file.seek(begin)
        while left > 0 and (piece := file.read(min(PIECE, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()

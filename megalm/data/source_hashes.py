"""sha256 of the files that a corpus was made of."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megalm.data.inputs import Position, Source
from megalm.errors import DataError

PIECE = 1 << 20

THREADS = 4
"""Files hashed at a time. One does 1.5 GB/s where the processor has instructions for sha256, and a third of that where
it has none, which a few files at a time make up for."""


class SourceHashes:
    """Computed beside the work, in threads: hashing holds no interpreter lock.

    Of a plain file of which a part is read, that part is hashed; other files whole.
    """

    def __init__(self, sources: Sequence[Source], start: Position, stop: Position) -> None:
        self._ranges: list[tuple[Source, int, int | None]] = []
        for number in range(start.source, min(stop.source + 1, len(sources))):
            source = sources[number]
            begin = start.offset if number == start.source else 0
            end = stop.offset if number == stop.source else None
            if end != 0:
                plain = not source.compression and source.format != "parquet"
                self._ranges.append((source, begin if plain else 0, end if plain else None))
        self._threads = ThreadPoolExecutor(THREADS)
        self._found: list[Future[dict[str, Any]]] = []
        self._running = False
        self._stopped = threading.Event()

    @property
    def sizes(self) -> list[int]:
        """Bytes of the files, in order."""
        return [source.size_bytes for source, _, _ in self._ranges]

    def start(self) -> None:
        """Begin, once the workers are forked; later calls do nothing."""
        if not self._running:
            self._running = True
            self._found = [self._threads.submit(_described, *found, self._stopped) for found in self._ranges]

    def get(self) -> list[dict[str, Any]]:
        """Wait for the descriptions of the sources."""
        self.start()
        try:
            return [found.result() for found in self._found]
        except OSError as error:
            raise DataError(f"cannot read {error.filename} again: {error.strerror}") from error

    def stop(self) -> None:
        """Leave the rest undone, so that a process with a bad line at the start of a large file can end."""
        self._stopped.set()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _described(source: Source, begin: int, end: int | None, stopped: threading.Event) -> dict[str, Any]:
    entry = {"path": str(source.path), "bytes": source.size_bytes, "sha256": _sha256(source, begin, end, stopped)}
    if begin or end is not None:
        entry["from_byte"], entry["to_byte"] = begin, source.size_bytes if end is None else end
    return entry


def _sha256(source: Source, begin: int, end: int | None, stopped: threading.Event) -> str:
    digest = hashlib.sha256()
    left = (source.size_bytes if end is None else end) - begin
    with source.path.open("rb") as file:
        file.seek(begin)
        while left > 0 and not stopped.is_set() and (piece := file.read(min(PIECE, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()

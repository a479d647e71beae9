"""A file that is written and hashed by two threads while a third prepares what comes next."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Condition, Thread
from types import TracebackType

from megalm.checkpoint.durable import FileRecord, open_new, sync, write_all

# Few enough to be in a processor's cache still when they are written.
MAX_AHEAD_BYTES = 32 * 1024 * 1024
_BLOCK_BYTES = 8 * 1024 * 1024


@dataclass
class _Chunk:
    data: memoryview
    users: int
    release: Callable[[], None] | None


class StreamedFile:
    """A new file. `put` returns at once; leaving the context waits until everything is on the disk.

    At most MAX_AHEAD_BYTES wait to be written and hashed, and what the last `put` brought.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_new(path)
        self._hash = hashlib.sha256()
        self._bytes = self._ahead = 0
        self._failure: BaseException | None = None
        self._changed = Condition()
        self._queues: list[Queue[_Chunk | None]] = [Queue(), Queue()]
        works = (partial(write_all, self._file), self._hash.update)
        self._threads = [
            Thread(target=self._run, args=pair, daemon=True) for pair in zip(self._queues, works, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, data: memoryview, release: Callable[[], None] | None = None) -> None:
        """Append bytes, which must stay as they are until `release` is called from another thread.

        Raises: what writing earlier ones raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ahead < MAX_AHEAD_BYTES or self._failure is not None)
            if self._failure is not None:
                raise self._failure
            self._ahead += data.nbytes
        self._bytes += data.nbytes
        chunk = _Chunk(data.cast("B") if data.nbytes else data, len(self._queues), release)
        for queue in self._queues:
            queue.put(chunk)

    def _run(self, queue: Queue[_Chunk | None], work: Callable[[memoryview], object]) -> None:
        while (chunk := queue.get()) is not None:
            try:
                for start in range(0, chunk.data.nbytes, _BLOCK_BYTES):
                    if self._failure is None:
                        work(chunk.data[start : start + _BLOCK_BYTES])
            except BaseException as error:
                self._failure = self._failure or error
            with self._changed:
                chunk.users -= 1
                last = chunk.users == 0
                if last:
                    self._ahead -= chunk.data.nbytes
                self._changed.notify_all()
            if last and chunk.release is not None:
                chunk.release()

    def __enter__(self) -> StreamedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._failure = self._failure or error
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join()
        try:
            if self._failure is None:
                sync(self._file)
        finally:
            self._file.close()
        if self._failure is not None and error is None:
            raise self._failure

    @property
    def record(self) -> FileRecord:
        """Name, length and hash of what was written; complete once the context is left."""
        return FileRecord(name=self._path.name, bytes=self._bytes, sha256=self._hash.hexdigest())

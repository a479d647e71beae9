"""A file that one thread hashes while another prepares and writes: as long as the slower of the two, the hashing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
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
    release: Callable[[], None] | None


class StreamedFile:
    """A new file. `put` writes at once and hashes later; leaving the context waits until all is hashed and on the disk.

    At most MAX_AHEAD_BYTES wait to be hashed, and what the last `put` brought.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_new(path)
        self._hash = hashlib.sha256()
        self._bytes = self._ahead = 0
        self._changed = Condition()
        self._queue: Queue[_Chunk | None] = Queue()
        self._thread = Thread(target=self._run, name="megalm hash", daemon=True)
        self._thread.start()

    def put(self, data: memoryview, release: Callable[[], None] | None = None) -> None:
        """Append bytes, which must stay as they are until `release` is called from another thread and `put` returned.

        Raises: OSError if they cannot be written.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ahead < MAX_AHEAD_BYTES)
            self._ahead += data.nbytes
        self._bytes += data.nbytes
        flat = data.cast("B") if data.nbytes else data
        self._queue.put(_Chunk(flat, release))
        for start in range(0, flat.nbytes, _BLOCK_BYTES):
            write_all(self._file, flat[start : start + _BLOCK_BYTES])

    def _run(self) -> None:
        while (chunk := self._queue.get()) is not None:
            for start in range(0, chunk.data.nbytes, _BLOCK_BYTES):
                self._hash.update(chunk.data[start : start + _BLOCK_BYTES])
            with self._changed:
                self._ahead -= chunk.data.nbytes
                self._changed.notify_all()
            if chunk.release is not None:
                chunk.release()

    def __enter__(self) -> StreamedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        try:
            if error is None:
                sync(self._file)
        finally:
            self._file.close()

    @property
    def record(self) -> FileRecord:
        """Name, length and hash of what was written; complete once the context is left."""
        return FileRecord(name=self._path.name, bytes=self._bytes, sha256=self._hash.hexdigest())

"""Writes that are on the disk when they return, and renames that happen whole or not at all.

Every change of the file system that a save makes goes through a function of this file, so that a fault can be injected
at each of them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import BinaryIO

from megalm.errors import CheckpointError

# Below this, starting a thread costs more than hashing.
_CONCURRENT_BYTES = 1 << 20
PASSING_ERRORS = frozenset({errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY})
RETRY_PAUSES_SECONDS = (0.1, 0.5, 2.0)


@dataclass(frozen=True)
class FileRecord:
    """What a file must contain: its name inside the checkpoint's folder, its length and its hash."""

    name: str
    bytes: int
    sha256: str


class HashingFile:
    """A new file that hashes what passes through it. Leaving the context flushes it to the disk.

    The name must not exist: nothing is ever overwritten in place.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._failure: OSError | None = None
        self._file = open_new(path)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append and hash, both at once where that is worth a thread. The caller may reuse `data` afterwards."""
        length = memoryview(data).nbytes
        if length < _CONCURRENT_BYTES:
            self._hash.update(data)
            self._append(data)
        else:
            hasher = Thread(target=self._hash.update, args=(data,), name="megalm hash")
            hasher.start()
            try:
                self._append(data)
            finally:
                hasher.join()
        self._bytes += length
        return length

    def _append(self, data: bytes | bytearray | memoryview) -> None:
        try:
            write_all(self._file, data)
        except OSError as error:
            self._failure = self._failure or error
            raise

    def flush(self) -> None:
        """Nothing is buffered here; torch.save calls this."""

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                sync(self._file)
        finally:
            self._file.close()
        if self._failure is not None and error is not self._failure:
            # torch closes its archive after a failed write and reports a wrong position in place of a full disk.
            raise self._failure from error

    @property
    def record(self) -> FileRecord:
        """Name, length and hash of what was written."""
        return FileRecord(name=self._path.name, bytes=self._bytes, sha256=self._hash.hexdigest())


@contextlib.contextmanager
def writing_to(destination: Path) -> Iterator[None]:
    """Say in a user's terms what a tool could not write: a full disk, a folder that is read-only or a file's name.

    Raises: CheckpointError in place of OSError.
    """
    try:
        yield
    except OSError as error:
        at = "" if error.filename is None else f": {error.filename}"
        raise CheckpointError(
            f"cannot write {destination}: {error.strerror or error}{at}\n  give a folder that can be written, with room"
        ) from error


def write_file(path: Path, produce: Callable[[HashingFile], None]) -> FileRecord:
    """Create `path` with what `produce` writes, and return its record once it is on the disk.

    An error that may pass (a network file system that stutters) is tried again after a pause, from the start.
    """
    for pause_seconds in (*RETRY_PAUSES_SECONDS, None):
        try:
            with HashingFile(path) as file:
                produce(file)
            return file.record
        except OSError as error:
            if pause_seconds is None or error.errno not in PASSING_ERRORS:
                raise
            with contextlib.suppress(FileNotFoundError):
                unlink(path)
            time.sleep(pause_seconds)
    raise AssertionError("unreachable: the last attempt returns or raises")


def write_text(path: Path, text: str) -> FileRecord:
    """Create a UTF-8 file."""
    return write_file(path, lambda file: _write_text(file, text))


def replace_text(path: Path, text: str) -> None:
    """Give `path` a new content such that a reader sees the old one or the new one, never a part."""
    beside = path.with_name(path.name + ".tmp")
    with contextlib.suppress(FileNotFoundError):
        unlink(beside)
    write_text(beside, text)
    rename(beside, path)
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Create a folder and its parents; one that is there is fine."""
    os.makedirs(path, exist_ok=True)


def publish_folder(temporary: Path, final: Path, *, replaced: Path) -> None:
    """Rename a finished folder to its name, durably.

    A folder that already has the name is set aside as `replaced` first and removed last, so that one of the two is
    whole at every instant.
    """
    sync_folder(temporary)
    if os.path.lexists(final):
        remove_folder(replaced)
        rename(final, replaced)
    rename(temporary, final)
    sync_folder(final.parent)
    remove_folder(replaced)


def remove_folder(path: Path) -> None:
    """Remove a folder; none there is fine. It loses its name first, so that no half of it is taken for a whole.

    Of a link to a folder, the link alone is removed.
    """
    if path.is_symlink():
        unlink(path)
        return
    if not path.exists():
        return
    doomed = path.with_name(path.name + ".removed.tmp")
    if path.name.endswith(".tmp"):
        doomed = path
    else:
        remove_folder(doomed)
        rename(path, doomed)
    remove_tree(doomed)


def open_new(path: Path) -> BinaryIO:
    """Open a file that must not exist yet, unbuffered."""
    return open(path, "xb", buffering=0)


def write_all(file: BinaryIO, data: bytes | bytearray | memoryview) -> None:
    """Write every byte: an unbuffered write may take fewer than it was given."""
    rest = memoryview(data).cast("B")
    while rest:
        written = file.write(rest)
        if not written:
            raise OSError(f"the file system took none of {len(rest)} bytes for {file.name}")
        rest = rest[written:]


def sync(file: BinaryIO) -> None:
    """Wait until the file's bytes are on the disk."""
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename within one file system, replacing a file of that name."""
    os.replace(source, target)


def unlink(path: Path) -> None:
    """Remove a file."""
    os.unlink(path)


def remove_tree(path: Path) -> None:
    """Remove a folder with everything in it."""
    shutil.rmtree(path)


def _write_text(file: HashingFile, text: str) -> None:
    file.write(text.encode())

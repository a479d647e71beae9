"""One process at a time in a folder, whatever host it is on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE_SECONDS = 600.0
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
"""What file systems without locks say; EBADF is NFS, which locks only what may be written."""


@contextlib.contextmanager
def folder_lock(
    folder: Path, *, name: str = ".lock", is_ours: bool = False, patience_seconds: float = PATIENCE_SECONDS
) -> Iterator[bool | None]:
    """Hold `folder/name` for the duration; yields whether it is held.

    The operating system frees the lock of a process that dies. Yields None where the file system has no locks, and
    False when another process keeps it for longer than `patience_seconds`.
    `is_ours` says that no other user locks this folder.
    Raises: OSError if the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Opened for reading, so that users who share a cache can lock what another of them made; NFS locks for writers
    # alone.
    mode = os.O_RDWR if is_ours else os.O_RDONLY
    descriptor = os.open(folder / name, mode | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield _acquired(descriptor, time.monotonic() + patience_seconds)
    finally:
        os.close(descriptor)


def _acquired(descriptor: int, deadline: float) -> bool | None:
    pause = 0.002
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(0.1, 2 * pause)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return None
            raise

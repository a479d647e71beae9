"""One process at a time in a folder, whatever host it is on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE_SECONDS = 5400.0
"""Who dies frees the lock, so that it is held by one that works: on the order of 2,000 corpora for half an hour. What
hangs is for the watchdog, which gives a part of the start more than this."""
MOST_PAUSE_SECONDS = 0.5
"""Thousands of ranks ask the file system's one server of locks."""
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
"""What file systems without locks say; EBADF is NFS, which locks only what may be written."""


@contextlib.contextmanager
def folder_lock(
    folder: Path,
    *,
    name: str = ".lock",
    is_ours: bool = False,
    patience_seconds: float = PATIENCE_SECONDS,
    is_needless: Callable[[], bool] = lambda: False,
) -> Iterator[bool | None]:
    """Hold `folder/name` for the duration; yields whether it is held.

    The operating system frees the lock of a process that dies. Yields None where the file system has no locks, and
    False when another process keeps it for longer than `patience_seconds`, or until the lock `is_needless`.
    `is_ours` says that no other user locks this folder.
    Raises: OSError if the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Opened for reading, so that users who share a cache can lock what another of them made; NFS locks for writers
    # alone.
    mode = os.O_RDWR if is_ours else os.O_RDONLY
    descriptor = os.open(folder / name, mode | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield _acquired(descriptor, time.monotonic() + patience_seconds, is_needless)
    finally:
        os.close(descriptor)


def _acquired(descriptor: int, deadline: float, is_needless: Callable[[], bool]) -> bool | None:
    pause = 0.002
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline or is_needless():
                return False
            time.sleep(pause)
            pause = min(MOST_PAUSE_SECONDS, 2 * pause)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return None
            raise

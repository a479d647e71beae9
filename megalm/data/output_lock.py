"""One writer of an output at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalm.errors import DataError


@contextmanager
def only_writer(output_prefix: str) -> Iterator[None]:
    """Hold `PREFIX.lock.tmp` for as long as the block lasts; a killed process lets go of it.

    Raises: DataError if another process on this machine, or on the file system where that passes locks on, writes the
    same output.
    """
    path = Path(f"{output_prefix}.lock.tmp")
    handle = _locked(path)
    try:
        yield
    finally:
        # Removed while it is held: whoever opened it before finds that it is gone, and makes a new one.
        path.unlink(missing_ok=True)
        os.close(handle)


def _locked(path: Path) -> int:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}\n  choose a folder that can be written") from error
        try:
            # Unlike that of flock, this lock is not passed on to workers, which may outlive a killed parent by a block.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            os.close(handle)
            raise DataError(
                f"another process is writing {str(path).removesuffix('.lock.tmp')}\n"
                "  wait for it, or choose another --output-prefix"
            ) from error
        except OSError:
            # A file system without locks: there the output is not guarded.
            return handle
        if _same(path, handle):
            return handle
        os.close(handle)


def _same(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False

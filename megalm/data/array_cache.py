"""Arrays kept on disk, so that they are computed once for all ranks and all later runs.

An entry is a folder that appears whole, by one rename. Its name holds a digest of everything that its arrays depend on.
Of the processes that miss an entry one builds it, under a lock of the cache folder, and the others wait: one in each
folder, and so one on each host where hosts share no file system. Arrays are mapped, so that the ranks of a host share
their memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.folder_lock import folder_lock
from megalm.data.mapped import map_array
from megalm.errors import DataError

FORMAT = 1
NAME_CHARACTERS = 100
"""Of the legible part of the name of an entry; the digest tells apart what is cut off."""

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Entry:
    """One place in a cache folder."""

    folder: Path
    what: str
    """What it holds, for messages: sample map, blend."""
    label: str
    """The legible part of its name; any characters."""
    key: Mapping[str, Any]
    """Everything that decides the arrays, in plain values."""
    parts: tuple[str, ...]
    """Names of the arrays."""

    @property
    def path(self) -> Path:
        """The folder of the entry: its label for people, the digest of the key for programs."""
        legible = re.sub(r"[^\w.-]", "_", self.label)
        while len(legible.encode()) > NAME_CHARACTERS:
            legible = legible[:-1]
        text = json.dumps([FORMAT, *self.key.values()])
        return self.folder / f"{legible}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


def cached_arrays(
    entry: Entry, build: Callable[[], Arrays], *, must_store: bool, log: Callable[[str], None] | None = None
) -> Arrays:
    """The arrays of an entry, from the cache if they are there and whole, else built and stored.

    Any number of processes may call this at once. An entry that is damaged is named in the log and built again. Where
    the folder cannot be written the arrays stay in memory, unless the cache `must_store` them.
    Raises: DataError if they must be stored and cannot.
    """
    try:
        if entry.path.is_dir():
            return read_entry(entry)
    except DataError:
        pass  # Said by the process that builds it again.
    try:
        return _built_by_one(entry, build, log=log)
    except OSError as error:
        if must_store:
            raise DataError(
                f"cannot write the {entry.what} {entry.path}: {error.strerror}\n"
                "  set by data.cache_path; choose a folder that can be written, or build the maps there before with "
                "tools/build_index.py"
            ) from error
        if log is not None:
            log(
                f"{entry.what}s are not cached, each process builds its own: {entry.folder}: {error.strerror}\n"
                "  --data-cache-path names another folder"
            )
        return build()


def _built_by_one(entry: Entry, build: Callable[[], Arrays], *, log: Callable[[str], None] | None) -> Arrays:
    """Build an entry that is absent or damaged, unless another process did while this one waited.

    Raises: OSError if the folder cannot be written.
    """
    path = entry.path
    found = _identity(path)
    # What is done under the lock is right without it, too: elsewhere it is made twice. Who waits reads what was built
    # as soon as it is there, side by side with the others: one after the other thousands would take an hour.
    with folder_lock(entry.folder, is_needless=lambda: _identity(path) not in (None, found)) as is_alone:
        if os.path.lexists(path):
            try:
                return read_entry(entry)
            except DataError as damage:
                if log is not None:
                    log(f"{damage}\n  it is built again")
                _remove(path)
        if is_alone:
            for left in entry.folder.glob(f".{path.name}.*"):  # by a builder that was killed
                shutil.rmtree(left, ignore_errors=True)
        built = build()
        write_entry(entry, built)
        try:
            return read_entry(entry)
        except DataError:
            return built


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a folder from another one that has its name later; None if there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _remove(path: Path) -> None:
    """Take an entry away in one step, so that no process meets half of it."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        os.rename(path, scratch / "damaged")
    except FileNotFoundError:
        pass  # Another process without a lock was faster.
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_entry(entry: Entry, arrays: Arrays) -> None:
    """Store arrays under their entry's name, unless another process was faster.

    Nothing waits for the disk: what a power failure tears is damaged, and that is found on reading and built again.
    """
    path = entry.path
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        description: dict[str, Any] = {"format": FORMAT, "key": dict(entry.key), "parts": {}}
        for part in entry.parts:
            array = np.ascontiguousarray(arrays[part])
            np.save(scratch / f"{part}.npy", array, allow_pickle=False)
            description["parts"][part] = {
                "dtype": array.dtype.str,
                "shape": list(array.shape),
                "sha256": hashlib.sha256(array.data).hexdigest(),
            }
        (scratch / "map.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
        scratch.chmod(0o755)
        try:
            os.rename(scratch, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_entry(entry: Entry) -> Arrays:
    """Map the arrays of an entry into memory.

    Raises: DataError that names the file and what is wrong with it.
    """
    folder, what = entry.path, entry.what
    try:
        description = json.loads((folder / "map.json").read_text(encoding="utf-8"))
        stored = description["key"]
        expected = {
            part: tuple(description["parts"][part][name] for name in ("dtype", "shape", "sha256"))
            for part in entry.parts
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{what} {folder}: map.json cannot be read: {error}") from error
    if stored != entry.key:
        differing = [
            name for name, value in entry.key.items() if not isinstance(stored, dict) or stored.get(name) != value
        ]
        raise DataError(f"{what} {folder} was made for another {', '.join(differing)}")
    arrays = {}
    for part in entry.parts:
        path = folder / f"{part}.npy"
        try:
            array = map_array(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{what} {path} cannot be read: {error}") from error
        dtype, shape, digest = expected[part]
        if array.dtype.str != dtype or list(array.shape) != shape:
            raise DataError(f"{what} {path} is {array.dtype.str} {list(array.shape)}, map.json says {dtype} {shape}")
        if hashlib.sha256(array.data).hexdigest() != digest:
            raise DataError(f"{what} {path} does not have the sha256 that map.json gives")
        arrays[part] = array
    return arrays

"""Sample maps kept on disk, so that they are built once for all ranks and all later runs.

An entry is a folder that appears whole, by one rename. Its name holds a digest of everything that the map depends on,
the lengths of the sequences included, so that a changed corpus can never meet an old map. Of the processes that miss
an entry one builds it, under a lock of the cache folder, and the others wait: one in each folder, and so one on each
host where hosts share no file system.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.folder_lock import folder_lock
from megalm.data.indexed import fingerprint
from megalm.data.mapped import map_array
from megalm.data.order import Order
from megalm.data.sample_map import SampleMap, build_sample_map
from megalm.errors import DataError

FORMAT = 1
PARTS = ("documents", "samples", "shuffle")
NAME_CHARACTERS = 100
"""Of a corpus and its split in the name of an entry; the digest tells apart what is cut off."""


@dataclass(frozen=True)
class MapKey:
    """Everything that decides a sample map."""

    fingerprint: str
    split_range: tuple[int, int]
    num_samples: int
    seq_length: int
    seed: int
    order: str

    @property
    def digest(self) -> str:
        """A short name of all fields together."""
        text = json.dumps([FORMAT, *vars(self).values()])
        return hashlib.sha256(text.encode()).hexdigest()[:20]


def cached_sample_map(
    prefix: str,
    name: str,
    lengths: npt.NDArray[np.int32],
    split_range: tuple[int, int],
    *,
    num_samples: int,
    seq_length: int,
    seed: int,
    order: Order,
    cache_path: str | None = None,
    content: str | None = None,
    log: Callable[[str], None] | None = None,
) -> SampleMap:
    """The sample map of one split of a corpus, from the cache if it is there and whole, else built and stored.

    Any number of processes may call this at once. An entry that is damaged is named in the log and built again.
    A cache folder that was asked for must be writable if it lacks the entry; beside a corpus that is read-only the map
    stays in memory. `content` is the fingerprint of `lengths`, if the caller has it.
    Raises: DataError if the folder that was asked for cannot be written.
    """
    key = MapKey(content or fingerprint(lengths), split_range, num_samples, seq_length, seed, order.name)
    folder = Path(cache_path) if cache_path is not None else Path(prefix).parent / "sample_maps"
    entry = folder / entry_name(prefix, name, key)

    def build() -> SampleMap:
        return build_sample_map(
            lengths, split_range, num_samples=num_samples, seq_length=seq_length, seed=seed, order=order
        )

    try:
        if entry.is_dir():
            return read_entry(entry, key)
    except DataError:
        pass  # Said by the process that builds it again.
    try:
        return _built_by_one(entry, key, build, log=log)
    except OSError as error:
        if cache_path is not None:
            raise DataError(
                f"cannot write the sample map {entry}: {error.strerror}\n"
                "  set by data.cache_path; choose a folder that can be written, or build the maps there before with "
                "tools/build_index.py"
            ) from error
        if log is not None:
            log(
                f"sample maps are not cached, each process builds its own: {folder}: {error.strerror}\n"
                "  --data-cache-path names another folder"
            )
        return build()


def entry_name(prefix: str, name: str, key: MapKey) -> str:
    """The file name of an entry: corpus and split for people, the digest for programs."""
    legible = re.sub(r"[^\w.-]", "_", f"{Path(prefix).name}-{name}")
    while len(legible.encode()) > NAME_CHARACTERS:
        legible = legible[:-1]
    return f"{legible}-{key.digest}"


def _built_by_one(
    entry: Path, key: MapKey, build: Callable[[], SampleMap], *, log: Callable[[str], None] | None
) -> SampleMap:
    """Build an entry that is absent or damaged, unless another process did while this one waited.

    Raises: OSError if the folder cannot be written.
    """
    with folder_lock(entry.parent) as is_alone:
        if os.path.lexists(entry):
            try:
                return read_entry(entry, key)
            except DataError as damage:
                if log is not None:
                    log(f"{damage}\n  it is built again")
                _remove(entry)
        if is_alone:
            for left in entry.parent.glob(f".{entry.name}.*"):  # by a builder that was killed
                shutil.rmtree(left, ignore_errors=True)
        built = build()
        write_entry(entry, key, built)
        try:
            return read_entry(entry, key)
        except DataError:
            return built


def _remove(entry: Path) -> None:
    """Take an entry away in one step, so that no process meets half of it."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        os.rename(entry, scratch / "damaged")
    except FileNotFoundError:
        pass  # Another process without a lock was faster.
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_entry(entry: Path, key: MapKey, sample_map: SampleMap) -> None:
    """Store a map under its name, unless another process was faster.

    Nothing waits for the disk: what a power failure tears is damaged, and that is found on reading and built again.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        description: dict[str, Any] = {"format": FORMAT, "key": _plain(key), "parts": {}}
        for part in PARTS:
            array = np.ascontiguousarray(getattr(sample_map, part))
            np.save(scratch / f"{part}.npy", array, allow_pickle=False)
            description["parts"][part] = {
                "dtype": array.dtype.str,
                "shape": list(array.shape),
                "sha256": hashlib.sha256(array.data).hexdigest(),
            }
        (scratch / "map.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
        scratch.chmod(0o755)
        try:
            os.rename(scratch, entry)
        except OSError:
            if not entry.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_entry(entry: Path, key: MapKey) -> SampleMap:
    """Map a stored sample map into memory.

    Raises: DataError that names the file and what is wrong with it.
    """
    try:
        description = json.loads((entry / "map.json").read_text(encoding="utf-8"))
        stored = description["key"]
        expected = {
            part: tuple(description["parts"][part][name] for name in ("dtype", "shape", "sha256")) for part in PARTS
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"sample map {entry}: map.json cannot be read: {error}") from error
    if stored != _plain(key):
        differing = [
            name for name in _plain(key) if not isinstance(stored, dict) or stored.get(name) != _plain(key)[name]
        ]
        raise DataError(f"sample map {entry} was made for another {', '.join(differing)}")
    arrays = {}
    for part in PARTS:
        path = entry / f"{part}.npy"
        try:
            array = map_array(path)
        except (OSError, ValueError) as error:
            raise DataError(f"sample map {path} cannot be read: {error}") from error
        dtype, shape, digest = expected[part]
        if array.dtype.str != dtype or list(array.shape) != shape:
            raise DataError(
                f"sample map {path} is {array.dtype.str} {list(array.shape)}, map.json says {dtype} {shape}"
            )
        if hashlib.sha256(array.data).hexdigest() != digest:
            raise DataError(f"sample map {path} does not have the sha256 that map.json gives")
        arrays[part] = array
    return SampleMap(arrays["documents"], arrays["samples"], arrays["shuffle"])


def _plain(key: MapKey) -> dict[str, Any]:
    return {**vars(key), "split_range": list(key.split_range)}

"""Sample maps kept on disk, so that they are built once for all ranks and all later runs.

An entry is a folder that appears whole, by one rename. Its name holds a digest of everything that the map depends on,
the lengths of the sequences included, so that a changed corpus can never meet an old map.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.indexed_writer import sync_folder
from megalm.data.order import Order
from megalm.data.sample_map import SampleMap, build_sample_map
from megalm.errors import DataError

FORMAT = 1
PARTS = ("documents", "samples", "shuffle")


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


def fingerprint(lengths: npt.NDArray[np.int32]) -> str:
    """Digest of the lengths of a corpus: all of its content that a sample map depends on."""
    return hashlib.sha256(np.ascontiguousarray(lengths).data).hexdigest()


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
    log: Callable[[str], None] | None = None,
) -> SampleMap:
    """The sample map of one split of a corpus, from the cache if it is there, else built and stored.

    Any number of processes may call this at once: each builds beside the entry and the first rename wins.
    A cache folder that was asked for must be writable; beside a corpus that is read-only the map stays in memory.
    """
    key = MapKey(fingerprint(lengths), split_range, num_samples, seq_length, seed, order.name)
    folder = Path(cache_path) if cache_path is not None else Path(prefix).parent / "sample_maps"
    entry = folder / f"{Path(prefix).name}-{name}-{key.digest}"
    if entry.is_dir():
        return read_entry(entry, key)
    built = build_sample_map(
        lengths, split_range, num_samples=num_samples, seq_length=seq_length, seed=seed, order=order
    )
    try:
        write_entry(entry, key, built)
    except OSError as error:
        if cache_path is not None:
            raise DataError(
                f"cannot write the sample map {entry}: {error.strerror}\n"
                "  set by data.cache_path; choose a folder that can be written"
            ) from error
        if log is not None:
            log(f"sample map of {prefix} is not cached: {folder}: {error.strerror}; --data-cache-path moves it")
        return built
    return read_entry(entry, key)


def write_entry(entry: Path, key: MapKey, sample_map: SampleMap) -> None:
    """Store a map under its name, unless another process was faster."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        description: dict[str, Any] = {"format": FORMAT, "key": _plain(key), "parts": {}}
        for part in PARTS:
            array = np.ascontiguousarray(getattr(sample_map, part))
            with (scratch / f"{part}.npy").open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            description["parts"][part] = {
                "dtype": array.dtype.str,
                "shape": list(array.shape),
                "sha256": hashlib.sha256(array.data).hexdigest(),
            }
        with (scratch / "map.json").open("w", encoding="utf-8") as text:
            json.dump(description, text, indent=1)
            text.flush()
            os.fsync(text.fileno())
        scratch.chmod(0o755)
        try:
            os.rename(scratch, entry)
        except OSError:
            if not entry.is_dir():
                raise
        sync_folder(entry.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_entry(entry: Path, key: MapKey) -> SampleMap:
    """Map a stored sample map into memory.

    Raises: DataError that names the file and what is wrong with it; the remedy is always to delete the entry.
    """
    remedy = f"delete the folder {entry}; it is built again"
    try:
        description = json.loads((entry / "map.json").read_text(encoding="utf-8"))
        stored, parts = description["key"], description["parts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"sample map {entry}: map.json cannot be read: {error}\n  {remedy}") from error
    if stored != _plain(key):
        differing = [
            name for name in _plain(key) if not isinstance(stored, dict) or stored.get(name) != _plain(key)[name]
        ]
        raise DataError(f"sample map {entry} was made for another {', '.join(differing)}\n  {remedy}")
    arrays = {}
    for part in PARTS:
        path = entry / f"{part}.npy"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"sample map {path} cannot be read: {error}\n  {remedy}") from error
        expected = parts.get(part, {})
        if array.dtype.str != expected.get("dtype") or list(array.shape) != expected.get("shape"):
            raise DataError(
                f"sample map {path} is {array.dtype.str} {list(array.shape)}, "
                f"map.json says {expected.get('dtype')} {expected.get('shape')}\n  {remedy}"
            )
        if hashlib.sha256(array.data).hexdigest() != expected.get("sha256"):
            raise DataError(f"sample map {path} does not have the sha256 that map.json gives\n  {remedy}")
        arrays[part] = array
    return SampleMap(arrays["documents"], arrays["samples"], arrays["shuffle"])


def _plain(key: MapKey) -> dict[str, Any]:
    return {**vars(key), "split_range": list(key.split_range)}

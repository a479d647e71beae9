"""The list of a checkpoint's files with their hashes, and what it takes to believe it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megalm.checkpoint import layout
from megalm.checkpoint.durable import FileRecord
from megalm.checkpoint.lineage import KEY, Lineage, parse_lineage
from megalm.errors import CheckpointError

FORMAT = 1
_OWN_HASH = "sha256"
_MAX_MANIFEST_BYTES = 256 * 1024 * 1024
_MAX_PARTS = 3
_BLOCK_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is: its step, the layout that wrote it, the model's shape, the versions, and every file."""

    step: int
    layout: Mapping[str, Any]
    model: Mapping[str, Any]
    versions: Mapping[str, str]
    files: tuple[FileRecord, ...] = field(default_factory=tuple)
    lineage: Lineage | None = None
    """As in train_state.json, which may be what is damaged."""

    def to_json(self) -> str:
        """The text of manifest.json, which ends with the hash of the rest: a manifest can be damaged as well."""
        content = {"format": FORMAT, **asdict(self)}
        return json.dumps({**content, _OWN_HASH: _hash_of(content)}, indent=1) + "\n"

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(record.bytes for record in self.files)


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json; the files are not touched yet.

    Raises: CheckpointError if it is missing, no manifest, of a newer format, or names a file outside its folder.
    """
    path = folder / layout.MANIFEST
    try:
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{folder} has no {layout.MANIFEST}: it was never published whole")
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path} is larger than any manifest ({_MAX_MANIFEST_BYTES} bytes)")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        return _manifest_of(content)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no manifest of format {FORMAT}: {error}") from error


def _manifest_of(content: Any) -> Manifest:
    if not isinstance(content, dict):
        raise ValueError("the top level is no object")
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']!r}")
    records = []
    seen = set()
    for entry in content["files"]:
        record = FileRecord(name=entry["name"], bytes=entry["bytes"], sha256=entry["sha256"])
        _check_record(record)
        if record.name in seen:
            raise ValueError(f"file {record.name!r} is listed twice")
        seen.add(record.name)
        records.append(record)
    step = content["step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"step is {step!r}")
    parts = {name: content[name] for name in ("layout", "model", "versions")}
    for name, value in parts.items():
        if not isinstance(value, dict):
            raise ValueError(f"{name} is no object")
    if content.get(_OWN_HASH) != _hash_of({name: value for name, value in content.items() if name != _OWN_HASH}):
        raise ValueError("it is not what was written (its own sha256 differs)")
    return Manifest(step=step, files=tuple(records), lineage=parse_lineage(content.get(KEY)), **parts)


def _hash_of(content: Mapping[str, Any]) -> str:
    """sha256 of the content whatever the order and the white space."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_record(record: FileRecord) -> None:
    check_member_name(record.name)
    if type(record.bytes) is not int or record.bytes < 0:
        raise ValueError(f"file {record.name!r} has {record.bytes!r} bytes")
    if not isinstance(record.sha256, str) or len(record.sha256) != 64:
        raise ValueError(f"file {record.name!r} has no sha256")


def check_file_name(name: object) -> None:
    """Refuse a name that could lead outside its folder.

    Raises: ValueError unless `name` is a plain file name.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or any(c in name for c in "/\\\0"):
        raise ValueError(f"{name!r} is no plain file name")


def check_member_name(name: object) -> None:
    """Refuse a name that could lead outside its checkpoint. Universal ones have one folder with others in it.

    Raises: ValueError unless `name` is a plain file name, or plain names below that folder.
    """
    parts: list[object] = list(name.split("/")) if isinstance(name, str) else []
    if not 2 <= len(parts) <= _MAX_PARTS or parts[0] != layout.UNIVERSAL_FOLDER:
        parts = [name]
    for part in parts:
        check_file_name(part)


def verify(
    folder: Path,
    manifest: Manifest,
    *,
    records: Iterable[FileRecord] | None = None,
    num_threads: int = 4,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Problems of a checkpoint's files against its manifest, one sentence each; none means that every byte is right.

    Some of the records may be given, so that ranks can share the work. Files that are not listed are harmless and
    not reported: nothing reads them. `progress` receives the bytes of each block as it is hashed.
    """
    chosen = list(manifest.files if records is None else records)
    with ThreadPoolExecutor(max_workers=max(1, num_threads)) as pool:
        problems = pool.map(lambda record: _problem(folder, record, progress), chosen)
        return [problem for problem in problems if problem]


def _problem(folder: Path, record: FileRecord, progress: Callable[[int], None] | None) -> str | None:
    path = folder / record.name
    try:
        for member in (path, *path.parents):
            if member == folder:
                break
            if member.is_symlink():
                return f"{member} is a link"
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        if size != record.bytes:
            return f"{path} has {size} bytes, not {record.bytes}"
        if hash_file(path, progress=progress) != record.sha256:
            return f"{path} does not have the bytes that were written (its sha256 differs)"
    except OSError as error:
        return f"{path} cannot be read: {error}"
    return None


def hash_file(path: Path, *, progress: Callable[[int], None] | None = None) -> str:
    """sha256 of a file, read in blocks; the disk reads the next ones meanwhile."""
    digest = hashlib.sha256()
    buffer = bytearray(_BLOCK_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        offset = 0
        while count := file.readinto(buffer):
            offset += count
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), offset, 2 * _BLOCK_BYTES, os.POSIX_FADV_WILLNEED)
            digest.update(view[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()

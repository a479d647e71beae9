"""What is in a checkpoint, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from megalm.checkpoint import layout
from megalm.checkpoint.durable import FileRecord
from megalm.checkpoint.find import has_no_hashes
from megalm.checkpoint.inert import read_with_stand_ins
from megalm.checkpoint.manifest import Manifest, read_manifest, verify
from megalm.checkpoint.optimizer_files import Reader
from megalm.checkpoint.source import open_checkpoint
from megalm.checkpoint.tensor_files import check_finite, read_tensors, tensors_of
from megalm.errors import CheckpointError


@dataclass
class Inspection:
    """The result of reading a checkpoint from end to end."""

    num_files: int = 0
    num_bytes: int = 0
    num_tensors: int = 0
    problems: list[str] = field(default_factory=list)
    """Reasons not to use it."""
    remarks: list[str] = field(default_factory=list)
    """Oddities that loading copes with."""


def inspect_checkpoint(
    folder: Path, *, hashes_only: bool = False, progress: Callable[[int, int], None] | None = None
) -> Inspection:
    """Check hashes against the manifest, then tensors for values that are not finite, shapes, and replica drift.

    Reads without running anything in the files; holds one layer's or one file's tensors at a time. `progress` receives
    the bytes of each step of the work, and those of all of it: every file is hashed, and those of tensors read again.
    """
    result = Inspection()
    read: Reader = read_tensors
    try:
        if has_no_hashes(folder):
            manifest, read = _listing(folder), read_with_stand_ins
            result.remarks.append("it is from another trainer and has no hashes: its tensors alone are checked")
        else:
            manifest = read_manifest(folder)
    except CheckpointError as error:
        result.problems.append(str(error))
        return result
    result.num_files, result.num_bytes = len(manifest.files), manifest.total_bytes
    to_read = [] if hashes_only else [record for record in manifest.files if record.name.endswith(".pt")]
    total = result.num_bytes + sum(record.bytes for record in to_read)

    def advance(count: int) -> None:
        if progress is not None:
            progress(count, total)

    if read is read_tensors:
        result.problems += verify(folder, manifest, progress=advance)
    listed = {record.name for record in manifest.files} | {layout.MANIFEST}
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    result.remarks += [f"{name} is not in the manifest; nothing reads it" for name in found if name not in listed]
    if result.problems or hashes_only:
        return result
    for record in to_read:
        try:
            _check_values(folder / record.name, result, read)
        except CheckpointError as error:
            result.problems.append(str(error))
        advance(record.bytes)
    try:
        layers = open_checkpoint(folder).layers
        for _ in layers.iterate():
            pass
        result.problems += [
            f"tensor-parallel copies of {name} differ by {size:.1e}" for name, size in layers.drift.items()
        ]
    except CheckpointError as error:
        result.problems.append(str(error))
    return result


def _listing(folder: Path) -> Manifest:
    """The files of a checkpoint that has no list of them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    records = [FileRecord(str(path.relative_to(folder)), path.stat().st_size, "") for path in paths]
    return replace(open_checkpoint(folder).manifest, files=tuple(records))


def _check_values(path: Path, result: Inspection, read: Reader) -> None:
    state = read(path, mmap=True)
    result.num_tensors += sum(1 for _ in tensors_of(state))
    check_finite(state, name=path.name)

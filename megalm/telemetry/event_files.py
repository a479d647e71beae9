"""TensorBoard's event files of a run that goes on from an earlier step.

TensorBoard's own way to forget what will happen again, `purge_step`, forgets what has a larger x, whether x counts
steps, samples or tokens: half of the tags would lose what did happen. The file of a process has its events in the order
of steps, so what happens again is the end of the file.
"""

from __future__ import annotations

import importlib
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

_MARK = "tfevents"
"""What TensorBoard knows a file by."""
_SET_ASIDE = "discarded"
_HEAD = struct.Struct("<QI")
"""Length of a record, and a checksum of that; the record and its own checksum follow."""
_CHECKSUM_BYTES = 4


def take_back(folder: Path, last_step: int, *, counts_steps: Callable[[str], bool], word: str) -> None:
    """Move what happened after `last_step` to files that TensorBoard does not read; renamed, they are event files.

    `counts_steps` tells tags that are drawn against steps, one of which begins each step of the run, and all of which
    have `word` in them, so that others need not be parsed. Files without any are left alone.
    Raises: OSError if a file cannot be read or written.
    """
    for path in sorted(folder.glob(f"*.{_MARK}.*")):
        start, first_length = _first_after(path, last_step, counts_steps, word.encode())
        if start is None:
            continue
        with path.open("rb") as file:
            version = file.read(first_length)
            file.seek(start)
            rest = file.read()
        with _new_file_beside(path).open("xb") as aside:
            aside.write(version + rest)
            aside.flush()
            os.fsync(aside.fileno())
        os.truncate(path, start)


def _first_after(
    path: Path, last_step: int, counts_steps: Callable[[str], bool], word: bytes
) -> tuple[int | None, int]:
    """Offset of the first event of a later step, if there is one; and the length of the first record."""
    event = importlib.import_module("tensorboard.compat.proto.event_pb2").Event()
    first_length = 0
    for start, end, record in _records(path):
        first_length = first_length or end
        if word not in record:
            continue
        try:
            event.ParseFromString(record)
        except Exception:  # protobuf's DecodeError: the file is damaged, and TensorBoard reads no further.
            break
        if event.step > last_step and any(counts_steps(value.tag) for value in event.summary.value):
            return start, first_length
    return None, first_length


def _records(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(offset, offset of the next one, content) of every whole record."""
    if path.stat().st_size == 0:  # which cannot be mapped
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = 0
        while start + _HEAD.size <= len(content):
            first = start + _HEAD.size
            last = first + _HEAD.unpack_from(content, start)[0]
            end = last + _CHECKSUM_BYTES
            if end > len(content):
                return
            yield start, end, content[first:last]
            start = end


def _new_file_beside(path: Path) -> Path:
    aside = path.with_name(path.name.replace(_MARK, _SET_ASIDE))
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name.replace(_MARK, _SET_ASIDE)}.{number}")
    return aside

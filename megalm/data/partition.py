"""A corpus cut into parts for several machines: contiguous, the same wherever it is computed, documents in order."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megalm.data.archives import open_file
from megalm.data.documents import MAX_LINE_BYTES, line_end
from megalm.data.inputs import Position, Source
from megalm.data.parquet import row_groups
from megalm.errors import DataError


@dataclass(frozen=True)
class Partition:
    """Part `index` of `count`, from 0."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise DataError(
                f"partition {self.index} of {self.count} does not exist\n  partitions are numbered 0 to COUNT - 1"
            )


WHOLE = Partition(0, 1)


def span(
    sources: Sequence[Source], partition: Partition, *, max_line_bytes: int = MAX_LINE_BYTES
) -> tuple[Position, Position]:
    """Where a part starts and where it stops.

    Sources count by the bytes of their files. A document belongs to the part in which its first byte lies, the rows
    of a parquet file being taken for equally long; a packed file goes whole to the part in which it starts.
    """
    starts = source_starts(sources)

    def boundary(index: int) -> Position:
        at = starts[-1] * index // partition.count
        # At 0 and at the very end there may be empty files, which belong to the first and to the last part.
        if index == partition.count:
            return Position(len(sources))
        number = next((i for i in range(len(sources)) if starts[i] <= at < starts[i + 1]), len(sources))
        if index == 0 or number == len(sources):
            return Position(0 if index == 0 else number)
        return _aligned(sources, number, at - starts[number], max_line_bytes)

    return boundary(partition.index), boundary(partition.index + 1)


def _aligned(sources: Sequence[Source], number: int, at: int, max_line_bytes: int) -> Position:
    """The first place between two documents at or after byte `at` of a source."""
    source = sources[number]
    if at == 0:
        return Position(number)
    if source.compression:
        return Position(number + 1)
    if source.format == "parquet":
        total = sum(rows for rows, _ in row_groups(source))
        offset = -(-at * total // source.size_bytes)
        return Position(number, offset) if offset < total else Position(number + 1)
    with open_file(source.path) as file:
        end = line_end(file, source, at - 1, at - 1, max_line_bytes)
    return Position(number, end) if end < source.size_bytes else Position(number + 1)


def byte_of(sources: Sequence[Source], position: Position) -> int:
    """How many bytes of the files lie before a position, about."""
    before = source_starts(sources)[position.source]
    if not position.offset:
        return before
    source = sources[position.source]
    if source.format != "parquet":
        return before + min(position.offset, source.size_bytes)
    total = sum(rows for rows, _ in row_groups(source))
    return before + source.size_bytes * position.offset // max(1, total)


def corpus_digest(sources: Sequence[Source], about: Mapping[str, Any]) -> str:
    """What all parts of one corpus have in common: files by name and size, in order, and how they are tokenized.

    Folders are left out, since machines may see the files in different places.
    """
    files = [(source.path.name, source.size_bytes) for source in sources]
    return hashlib.sha256(json.dumps([files, about], sort_keys=True).encode()).hexdigest()


def source_starts(sources: Sequence[Source]) -> list[int]:
    """Bytes of the files before each, and of all."""
    return list(itertools.accumulate((source.size_bytes for source in sources), initial=0))

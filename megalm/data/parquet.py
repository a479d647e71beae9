"""Documents out of parquet files: a text column read batch by batch."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.data.inputs import Position, Source
from megalm.data.lines import LongDocument
from megalm.data.long_line import LONG_LINE_BYTES, LONG_STRING_BYTES, BufferText
from megalm.errors import DataError

BATCH_BYTES = 1 << 20
BATCH_ROWS = 1024

ROWS_BLOCK = 8
"""How many times longer than a block of lines a block of rows is. A row group can be read from its start only, so that
every block of it unpacks what lies before: few blocks cost less time, short ones less memory."""

PARTS_OF_GROUP = 64
"""Most blocks of a row group, however large it is."""

TEXT_TYPES = ("string", "large_string", "string_view")


@dataclass(frozen=True)
class BadRow:
    """A row that gives no document."""

    row_group: int
    row: int
    reason: str

    def place(self, lines_before: int) -> dict[str, int]:
        """Where it is: both count from 0, the row within its group."""
        return {"row_group": self.row_group, "row": self.row}


@dataclass(frozen=True)
class RowBlock:
    """Rows of one row group."""

    source: int
    path: Path
    row_group: int
    first_row: int
    """Within the row group, from 0."""
    num_rows: int
    offset: int
    """Rows of the file before it."""
    consumed_bytes: int
    """About how many bytes of the file lie before its end."""
    row_bytes: int
    """Of a row on the average of its group."""
    longest: int
    """Bytes of the longest text that is a document."""

    @property
    def size(self) -> int:
        """About its bytes."""
        return self.num_rows * self.row_bytes

    def documents(self, keys: Sequence[str], *, by_pieces: bool = False) -> Iterator[LongDocument | BadRow]:
        """The document of each row; `by_pieces` leaves texts that are too long for memory in the buffers of pyarrow.

        Raises: DataError if the file is damaged.
        """
        row = self.first_row
        for texts in self._rows(keys, by_pieces):
            reason = next((text.reason for text in texts if isinstance(text, _Refused)), None)
            if reason is None:
                yield tuple(text for text in texts if not isinstance(text, _Refused))
            else:
                yield BadRow(self.row_group, row, reason)
            row += 1

    def discard(self) -> None:
        """Nothing is kept for a block."""

    def end(self, line: int) -> Position:
        """Where the next block starts."""
        return Position(self.source, self.offset + self.num_rows)

    def _rows(self, keys: Sequence[str], by_pieces: bool) -> Iterator[tuple[str | BufferText | _Refused, ...]]:
        with _opened(self.path) as file:
            names = file.schema_arrow.names
            missing = {key: _missing(key, names) for key in keys if key not in names}
            twice = next((key for key in keys if names.count(key) > 1), None)
            if twice is not None:
                raise DataError(f"{self.path} has more than one column {twice!r}\n  give each column a name of its own")
            present = [key for key in keys if key not in missing]
            for batch in self._batches(file, present):
                columns = [missing[key] if key in missing else batch.column(key) for key in keys]
                found = [
                    _texts(column, key, len(batch), self.longest, by_pieces)
                    for column, key in zip(columns, keys, strict=True)
                ]
                yield from zip(*found, strict=True)

    def _batches(self, file: Any, keys: list[str]) -> Iterator[Any]:
        """The rows of this block, some at a time; without a single column there is nothing but their number."""
        if not keys:
            yield range(self.num_rows)
            return
        size = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, self.row_bytes)))
        first, last, at = self.first_row, self.first_row + self.num_rows, 0
        try:
            found = file.iter_batches(batch_size=size, row_groups=[self.row_group], columns=keys, use_threads=False)
            for batch in found:
                begin, stop = max(first - at, 0), min(last - at, len(batch))
                if begin < stop:
                    yield batch.slice(begin, stop - begin)
                at += len(batch)
                if at >= last:
                    return
        # pyarrow's errors are of both kinds.
        except (OSError, ValueError) as error:
            raise _damaged(f"{self.path}, row group {self.row_group}, after row {at}", error) from error
        raise DataError(
            f"{self.path}, row group {self.row_group}: {at} rows, its footer says {last} or more\n"
            "  copy or download the file again"
        )


def row_blocks(
    source: Source, number: int, first: int, last: int | None, *, block_bytes: int, longest: int
) -> Iterator[RowBlock]:
    """Blocks of rows `first` to `last` of a file.

    Raises: DataError if it is not a parquet file or its footer is damaged.
    """
    start = 0
    sizes = row_groups(source)
    total = max(1, sum(rows for rows, _ in sizes))
    for group, (rows, group_bytes) in enumerate(sizes):
        stop = rows if last is None else min(rows, last - start)
        want = max(ROWS_BLOCK * block_bytes, group_bytes // PARTS_OF_GROUP)
        step = max(1, rows * want // max(1, group_bytes))
        for begin in range(max(0, first - start), stop, step):
            count = min(step, stop - begin)
            read = source.size_bytes * (start + begin + count) // total
            yield RowBlock(number, source.path, group, begin, count, start + begin, read, group_bytes // rows, longest)
        start += rows


def row_groups(source: Source) -> list[tuple[int, int]]:
    """Rows and bytes of each row group."""
    with _opened(source.path) as file:
        metadata = file.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]


def _opened(path: Path) -> Any:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(f"{path} needs the pyarrow package\n  pip install pyarrow") from error
    try:
        return parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    except (OSError, ValueError) as error:
        raise _damaged(str(path), error) from error


def _damaged(where: str, error: Exception) -> DataError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DataError(f"{where}: damaged, or no parquet file: {reason}\n  copy or download the file again")


@dataclass(frozen=True)
class _Refused:
    reason: str


def _missing(key: str, names: Sequence[str]) -> _Refused:
    return _Refused(f"no column {key!r}; its columns are {', '.join(names[:8]) or 'none'}")


def _texts(column: Any, key: str, size: int, longest: int, by_pieces: bool) -> Iterator[str | BufferText | _Refused]:
    if isinstance(column, _Refused):
        yield from [column] * size
        return
    for value in _values(column, by_pieces):
        if isinstance(value, BufferText):
            long = len(value.data) > longest
        elif isinstance(value, str):
            # A character takes four bytes at most, so that most texts need not be encoded to know.
            long = 4 * len(value) > longest and len(value.encode()) > longest
        elif isinstance(value, _Refused):
            yield _Refused(f"column {key!r} holds {value.reason}")
            continue
        else:
            yield _Refused(f"column {key!r} holds {'null' if value is None else column.type}, not a string")
            continue
        yield _Refused(f"column {key!r} holds a text longer than {longest} bytes") if long else value


def _values(column: Any, by_pieces: bool) -> Iterator[Any]:
    if not (by_pieces and column.nbytes > LONG_LINE_BYTES):
        try:
            yield from column.to_pylist()
            return
        except UnicodeDecodeError:
            # One of them is wrong; the others are good.
            pass
    for scalar in column:
        yield _value(scalar, by_pieces)


def _value(scalar: Any, by_pieces: bool) -> Any:
    text = str(scalar.type) in TEXT_TYPES
    buffer = scalar.as_buffer() if by_pieces and text and scalar.is_valid else None
    try:
        if buffer is None or len(buffer) <= LONG_STRING_BYTES:
            return scalar.as_py()
        long = BufferText(memoryview(buffer))
        # Every long string is decoded once before a token is made of it, so that a bad one leaves no trace.
        for _ in long.pieces():
            pass
        return long
    except UnicodeDecodeError as error:
        return _Refused(f"bytes that are not UTF-8, the first of them {error.object[error.start]:#04x}")

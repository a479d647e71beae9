"""Raw text files and the blocks of whole lines or rows that they are worked off in."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from megalm.data.archives import PIECE, Stream, open_file
from megalm.data.inputs import Position, Source
from megalm.data.lines import BadLine, LongDocument, count_line_feeds, read_lines, read_long_lines
from megalm.data.long_line import LONG_LINE_BYTES
from megalm.data.parquet import RowBlock, row_blocks
from megalm.errors import DataError

BLOCK_BYTES = 1 << 20
"""Size of a block; a longer line makes a longer one."""

SPOOL_BYTES = 32 << 20
"""A decompressed block above this goes through a file rather than through memory."""

MAX_LINE_BYTES = 1 << 30
"""A longer line is no document: a missing line feed, or a file of another kind."""

SEARCH_BYTES = 1 << 16
"""Read at first to find the end of a line."""


@dataclass(frozen=True)
class LineBlock:
    """Whole lines of one source."""

    source: int
    format: str
    """json or text."""
    offset: int
    """Where it starts, in bytes of the uncompressed source."""
    size: int
    consumed_bytes: int
    """Bytes of the source's file before its end."""
    path: Path | None = None
    """File to read it from, at `path_offset`; else it is `data`."""
    path_offset: int = 0
    data: bytes = b""
    spooled: bool = False
    """Whether `path` is a scratch file to delete after use."""

    def documents(self, keys: Sequence[str], *, by_pieces: bool = False) -> Iterator[LongDocument | BadLine]:
        """The document of each line; lines count from 1 in the block.

        `by_pieces` leaves texts that are too long for memory in their file.
        """
        if by_pieces and self.format == "json" and self.path is not None and self.size > LONG_LINE_BYTES:
            return read_long_lines(self.path, self.path_offset, self.size, keys=keys, first_line=1, offset=self.offset)
        return read_lines(self.read(), format_name=self.format, keys=keys, first_line=1, offset=self.offset)

    def read(self) -> bytes:
        """The lines."""
        if self.path is None:
            return self.data
        with self.path.open("rb") as file:
            file.seek(self.path_offset)
            content = file.read(self.size)
        self.discard()
        if len(content) != self.size:
            raise DataError(f"{self.path} became shorter while it was read: {len(content)} of {self.size} bytes")
        return content

    def discard(self) -> None:
        """Delete the scratch file, if there is one; nothing can be read afterwards."""
        if self.spooled and self.path is not None:
            self.path.unlink(missing_ok=True)

    def end(self, line: int) -> Position:
        """Where the next block starts, whose first line is `line`."""
        return Position(self.source, self.offset + self.size, line)


Block = LineBlock | RowBlock


def blocks(
    sources: Sequence[Source],
    *,
    start: Position | None = None,
    stop: Position | None = None,
    block_bytes: int = BLOCK_BYTES,
    max_line_bytes: int = MAX_LINE_BYTES,
    scratch: Path | None = None,
) -> Iterator[Block]:
    """Blocks of whole documents, in order, from `start` to `stop`, which must lie between documents.

    Of plain files only the ends of blocks are found here: whoever works off a block reads it.
    Raises: DataError for a line that is too long and for a damaged file, with its place.
    """
    begin = start or Position()
    end = stop or Position(len(sources))
    for number in range(begin.source, min(end.source + 1, len(sources))):
        first = begin.offset if number == begin.source else 0
        last = end.offset if number == end.source else None
        source = sources[number]
        if last == 0:
            continue
        if source.format == "parquet":
            yield from row_blocks(source, number, first, last, block_bytes=block_bytes, longest=max_line_bytes)
        elif source.compression:
            yield from _ArchiveLines(source, number, first, block_bytes, max_line_bytes, scratch).blocks()
        else:
            yield from _plain_blocks(source, number, first, last, min(block_bytes, max_line_bytes), max_line_bytes)


def _plain_blocks(
    source: Source, number: int, first: int, last: int | None, block_bytes: int, max_line_bytes: int
) -> Iterator[LineBlock]:
    end = source.size_bytes if last is None else last
    with open_file(source.path) as file:
        if file.seek(0, 2) != source.size_bytes:
            raise DataError(f"{source.path} changed its size from {source.size_bytes} bytes while it was to be read")
        while first < end:
            stop = min(end, line_end(file, source, first, first + block_bytes - 1, max_line_bytes))
            yield LineBlock(number, source.format, first, stop - first, stop, source.path, first)
            first = stop


def line_end(file: BinaryIO, source: Source, first: int, at: int, max_line_bytes: int) -> int:
    """Where the line ends that byte `at` belongs to, its line feed included; it begins at `first` or later.

    Raises: DataError if the line is too long.
    """
    file.seek(at)
    size, position = SEARCH_BYTES, at
    while piece := file.read(size):
        found = piece.find(b"\n") + 1
        position += found or len(piece)
        if position - first > max_line_bytes:
            begin = _line_begin(file, at)
            if position - begin - bool(found) > max_line_bytes:
                raise _too_long(source, begin, count_line_feeds(source.path, begin) + 1, max_line_bytes)
            file.seek(position)
        if found:
            return position
        size = min(2 * size, PIECE)
    return position


def _line_begin(file: BinaryIO, at: int) -> int:
    """Where the line starts that byte `at` belongs to."""
    while at > 0:
        size = min(at, PIECE)
        file.seek(at - size)
        found = file.read(size).rfind(b"\n")
        if found >= 0:
            return at - size + found + 1
        at -= size
    return 0


def _too_long(source: Source, begin: int, line: int, max_line_bytes: int) -> DataError:
    return DataError(
        f"{source.path}, line {line}, byte {begin}: the line is longer than {max_line_bytes} bytes\n"
        "  a document cannot be that long; --max-line-bytes sets the limit"
    )


class _ArchiveLines:
    """Blocks of a packed file, which only one process can unpack."""

    def __init__(
        self, source: Source, number: int, first: int, block_bytes: int, max_line_bytes: int, scratch: Path | None
    ) -> None:
        self.source = source
        self.number = number
        self.first = first
        self.block_bytes = block_bytes
        self.max_line_bytes = max_line_bytes
        self.scratch = scratch

    def blocks(self) -> Iterator[LineBlock]:
        """Read pieces until enough whole lines are together; cut after the last line feed."""
        with Stream(self.source) as file:
            line = 1 + self._skip(file)
            offset = self.first
            held = _Held(self.scratch)
            while True:
                piece = self._read(file, offset + held.size, line, limit=min(PIECE, self.block_bytes))
                cut = piece.rfind(b"\n") + 1
                if piece and (cut == 0 or held.size + cut < self.block_bytes):
                    held.add(piece)
                    # The line that is open now started after the last line feed.
                    if held.open_bytes > self.max_line_bytes:
                        begin = offset + held.size - held.open_bytes
                        held.discard()
                        raise _too_long(self.source, begin, line + held.lines, self.max_line_bytes)
                    continue
                held.add(piece[:cut] if piece else b"")
                if held.size:
                    yield held.block(self.number, self.source.format, offset, file.consumed_bytes)
                    offset, line = offset + held.size, line + held.lines
                if not piece:
                    return
                held = _Held(self.scratch)
                held.add(piece[cut:])

    def _skip(self, file: Stream) -> int:
        """Go to where the work begins; returns the line feeds before it."""
        left, lines = self.first, 0
        while left:
            piece = self._read(file, self.first - left, lines + 1, limit=min(PIECE, left))
            if not piece:
                raise DataError(f"{self.source.path} ends before byte {self.first}, where the work was to go on")
            left -= len(piece)
            lines += piece.count(b"\n")
        return lines

    def _read(self, file: Stream, offset: int, line: int, *, limit: int) -> bytes:
        try:
            return file.read(limit)
        except (EOFError, OSError, zlib.error, ValueError) as error:
            raise DataError(
                f"{self.source.path} is damaged after byte {offset} of its content, near line {line}: {error}\n"
                "  copy or download the archive again"
            ) from error


class _Held:
    """Unpacked lines on their way into a block: in memory, or spooled to a file."""

    def __init__(self, scratch: Path | None) -> None:
        self.scratch = scratch
        self.size = 0
        self.lines = 0
        self.open_bytes = 0
        self._pieces: list[bytes] = []
        self._spool: IO[bytes] | None = None

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        found = piece.count(b"\n")
        self.lines += found
        self.open_bytes = len(piece) - piece.rfind(b"\n") - 1 if found else self.open_bytes + len(piece)
        if self._spool is None and self.size > SPOOL_BYTES:
            self._spool = tempfile.NamedTemporaryFile(dir=self.scratch, suffix=".lines", delete=False)
            self._spool.writelines(self._pieces)
            self._pieces = []
        if self._spool is None:
            self._pieces.append(piece)
        else:
            self._spool.write(piece)

    def block(self, source: int, format_name: str, offset: int, consumed_bytes: int) -> LineBlock:
        if self._spool is not None:
            self._spool.close()
            path = Path(self._spool.name)
            return LineBlock(source, format_name, offset, self.size, consumed_bytes, path, 0, spooled=True)
        return LineBlock(source, format_name, offset, self.size, consumed_bytes, data=b"".join(self._pieces))

    def discard(self) -> None:
        """Delete what was spooled."""
        if self._spool is not None:
            self._spool.close()
            Path(self._spool.name).unlink(missing_ok=True)

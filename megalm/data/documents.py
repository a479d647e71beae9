"""Raw text files and the blocks of whole lines that they are worked off in."""

from __future__ import annotations

import gzip
import importlib
import io
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from megalm.errors import DataError

BLOCK_BYTES = 1 << 20
"""Size of a block; a longer line makes a longer one."""

SPOOL_BYTES = 32 << 20
"""A decompressed block above this goes through a file rather than through memory."""

MAX_LINE_BYTES = 1 << 30
"""A longer line is no document: a missing line feed, or a file of another kind."""

PIECE = 1 << 20

FORMATS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".txt": "text"}
COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: Path
    format: str
    """json: an object a line; text: a document a line."""
    compression: str
    """"", ".gz" or ".zst"."""
    size_bytes: int


@dataclass(frozen=True)
class Block:
    """Whole lines of one source."""

    source: int
    offset: int
    """Where it starts, in bytes of the uncompressed source."""
    size: int
    first_line: int
    """1 is the first line of the source."""
    num_lines: int
    path: Path | None = None
    """File to read it from, at `path_offset`; else it is `data`."""
    path_offset: int = 0
    data: bytes = b""
    spooled: bool = False
    """Whether `path` is a scratch file to delete after use."""

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


@dataclass(frozen=True)
class Position:
    """Where the next block starts; enough to go on later."""

    source: int = 0
    offset: int = 0
    line: int = 1


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """The files that paths, folders and glob patterns name, in order; folders and patterns in order of name.

    Raises: DataError for what does not exist or has no known suffix.
    """
    found: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            inside = sorted(entry for entry in path.rglob("*") if entry.is_file() and _format_of(entry) is not None)
            if not inside:
                raise DataError(f"folder {path} holds no input file\n  suffixes that are read: {_suffixes()}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            matches = [Path(match) for match in sorted(_glob(text))]
            if not matches:
                raise DataError(f"no input file {text}")
            found += matches
    for path in found:
        if found.count(path) > 1:
            raise DataError(f"input {path} is given twice")
    return [_source(path) for path in found]


def blocks(
    sources: Sequence[Source],
    *,
    start: Position | None = None,
    block_bytes: int = BLOCK_BYTES,
    max_line_bytes: int = MAX_LINE_BYTES,
    scratch: Path | None = None,
) -> Iterator[Block]:
    """Blocks of whole lines, in order, from `start` on.

    Plain files are only measured here and read again by whoever works off the block; so nothing large is held.
    Raises: DataError for a line that is too long and for a damaged archive, with file, line and byte offset.
    """
    position = start or Position()
    for number in range(position.source, len(sources)):
        first = position if number == position.source else Position(number)
        yield from _Scanner(sources[number], first, block_bytes, max_line_bytes, scratch).blocks()


class _Scanner:
    def __init__(
        self, source: Source, start: Position, block_bytes: int, max_line_bytes: int, scratch: Path | None
    ) -> None:
        self.source = source
        self.start = start
        self.block_bytes = block_bytes
        self.max_line_bytes = max_line_bytes
        self.scratch = scratch

    def blocks(self) -> Iterator[Block]:
        """Read pieces until enough whole lines are together; cut after the last line feed."""
        with open_source(self.source) as file:
            self._skip(file, self.start.offset)
            offset, line = self.start.offset, self.start.line
            held = _Held(self.source, self.scratch)
            while True:
                piece = self._read(file, offset + held.size, line, limit=min(PIECE, self.block_bytes))
                cut = piece.rfind(b"\n") + 1
                if piece and (cut == 0 or held.size + cut < self.block_bytes):
                    held.add(piece)
                    # The line that is open now started after the last line feed.
                    if held.open_bytes > self.max_line_bytes:
                        begin = offset + held.size - held.open_bytes
                        raise DataError(
                            f"{self.source.path}, line {line + held.lines}, byte {begin}: "
                            f"the line is longer than {self.max_line_bytes} bytes\n"
                            "  a document cannot be that long; --max-line-bytes sets the limit"
                        )
                    continue
                held.add(piece[:cut] if piece else b"")
                if held.size:
                    block = held.block(self.start.source, offset, line)
                    yield block
                    offset, line = offset + block.size, line + block.num_lines
                if not piece:
                    return
                held = _Held(self.source, self.scratch)
                held.add(piece[cut:])

    def _skip(self, file: IO[bytes], size: int) -> None:
        if not self.source.compression:
            file.seek(size)
            return
        left = size
        while left:
            piece = self._read(file, size - left, 1, limit=min(PIECE, left))
            if not piece:
                raise DataError(f"{self.source.path} ends before byte {size}, where the work was to go on")
            left -= len(piece)

    def _read(self, file: IO[bytes], offset: int, line: int, *, limit: int) -> bytes:
        try:
            return file.read(limit)
        except (EOFError, OSError, zlib.error, ValueError) as error:
            raise DataError(
                f"{self.source.path} is damaged after byte {offset} of its content, near line {line}: {error}\n"
                "  copy or download the archive again"
            ) from error


class _Held:
    """Lines on their way into a block: counted only, kept in memory, or spooled to a file."""

    def __init__(self, source: Source, scratch: Path | None) -> None:
        self.source = source
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
        if not self.source.compression:
            return
        if self._spool is None and self.size > SPOOL_BYTES:
            self._spool = tempfile.NamedTemporaryFile(dir=self.scratch, suffix=".lines", delete=False)
            self._spool.writelines(self._pieces)
            self._pieces = []
        if self._spool is None:
            self._pieces.append(piece)
        else:
            self._spool.write(piece)

    def block(self, source: int, offset: int, line: int) -> Block:
        lines = self.lines + (1 if self.open_bytes else 0)
        if not self.source.compression:
            return Block(source, offset, self.size, line, lines, self.source.path, offset)
        if self._spool is not None:
            self._spool.close()
            return Block(source, offset, self.size, line, lines, Path(self._spool.name), 0, spooled=True)
        return Block(source, offset, self.size, line, lines, data=b"".join(self._pieces))


def open_source(source: Source) -> BinaryIO:
    """The uncompressed bytes of a source."""
    try:
        if source.compression == ".gz":
            return cast(BinaryIO, gzip.open(source.path, "rb"))
        if source.compression == ".zst":
            return io.BufferedReader(_ZstandardReader(source.path), PIECE)
        return source.path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {source.path}: {error.strerror or error}") from error


class _ZstandardReader(io.RawIOBase):
    """A .zst file uncompressed; unlike the library's own reader it takes a file that is cut off for damaged."""

    def __init__(self, path: Path) -> None:
        try:
            zstandard = importlib.import_module("zstandard")
        except ImportError as error:
            raise DataError(f"{path} needs the zstandard package\n  pip install zstandard") from error
        self._error: type[Exception] = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._file = path.open("rb")
        self._begun = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            raw = self._file.read(PIECE // 8)
            if not raw:
                if self._begun:
                    raise EOFError("the file ends within a compressed frame")
                return 0
            self._ready = self._feed(raw)
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _feed(self, raw: bytes) -> bytes:
        parts = []
        while raw:
            self._begun = True
            try:
                parts.append(self._frame.decompress(raw))
            except self._error as error:
                raise ValueError(str(error)) from error
            raw = b""
            if self._frame.eof:
                raw = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
                self._begun = False
        return b"".join(parts)

    def close(self) -> None:
        self._file.close()
        super().close()


def _source(path: Path) -> Source:
    format_name = _format_of(path)
    if format_name is None:
        raise DataError(f"input {path} has no suffix that says what it is\n  suffixes that are read: {_suffixes()}")
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    try:
        with path.open("rb"):
            size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read input {path}: {error.strerror}") from error
    if compression and not size:
        raise DataError(f"input {path} is empty, which no {compression} archive is\n  copy or download it again")
    return Source(path, format_name, compression, size)


def _format_of(path: Path) -> str | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes = suffixes[:-1]
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _glob(pattern: str) -> list[str]:
    import glob

    return glob.glob(pattern, recursive=True)


def _suffixes() -> str:
    return ", ".join(FORMATS) + ", each also with " + " or ".join(COMPRESSIONS)

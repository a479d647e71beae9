"""Uncompressed bytes of plain and packed files."""

from __future__ import annotations

import gzip
import importlib
import io
from pathlib import Path
from typing import Any, BinaryIO, cast

from megalm.data.inputs import Source
from megalm.errors import DataError

PIECE = 1 << 20


class Stream:
    """The uncompressed bytes of a source, and how far its file is read."""

    def __init__(self, source: Source) -> None:
        self._raw = open_file(source.path)
        try:
            self._file = _unpacked(self._raw, source)
        except BaseException:
            self._raw.close()
            raise

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._raw.close()

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; none at the end."""
        return self._file.read(size)

    @property
    def consumed_bytes(self) -> int:
        """Bytes of the file that are read."""
        return self._raw.tell()


def open_file(path: Path) -> BinaryIO:
    """A file to read from. Raises: DataError if it cannot be read."""
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _unpacked(raw: BinaryIO, source: Source) -> BinaryIO:
    if source.compression == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
    if source.compression == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstandardReader(raw, source.path), PIECE))
    return raw


class _ZstandardReader(io.RawIOBase):
    """A .zst file uncompressed; unlike the library's own reader it takes a file that is cut off for damaged."""

    def __init__(self, raw: BinaryIO, path: Path) -> None:
        try:
            zstandard = importlib.import_module("zstandard")
        except ImportError as error:
            raise DataError(f"{path} needs the zstandard package\n  pip install zstandard") from error
        self._error: type[Exception] = zstandard.ZstdError
        # Large archives are packed with windows of up to 2 GB (zstd --long=31); the default refuses above 128 MB.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame = self._decompressor.decompressobj()
        self._file = raw
        self._begun = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            raw = self._file.read(PIECE // 8)
            if not raw:
                if self._begun:
                    raise EOFError("the file ends within a compressed frame")
                return 0
            self._ready = memoryview(self._feed(raw))
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

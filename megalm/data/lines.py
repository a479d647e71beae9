"""Documents out of lines: JSON objects or plain text, and what can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.data.long_line import PIECE, BufferText, LongLineError, LongText, skeleton

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class BadLine:
    """A line that gives no document."""

    line: int
    offset: int
    """Where it starts, in bytes of the uncompressed source."""
    reason: str

    def place(self, lines_before: int) -> dict[str, int]:
        """Where it is; `lines_before` lines precede what `line` counts in."""
        return {"line": lines_before + self.line, "byte": self.offset}


Document = tuple[str, ...]
"""The text of each key."""

LongDocument = tuple[str | LongText | BufferText, ...]
"""The text of each key, or where it lies."""


def read_lines(
    content: bytes, *, format_name: str, keys: Sequence[str], first_line: int, offset: int
) -> Iterator[Document | BadLine]:
    """The document of each line, or what is wrong with it."""
    parse = _JsonLine(keys).parse if format_name == "json" else _parse_text
    start, number = 0, first_line
    while start < len(content):
        stop = content.find(b"\n", start)
        if stop < 0:
            stop = len(content)
        try:
            yield parse(content[start:stop])
        except _RefusedError as error:
            yield BadLine(number, offset + start, str(error))
        start, number = stop + 1, number + 1


def read_long_lines(
    path: Path, start: int, size: int, *, keys: Sequence[str], first_line: int, offset: int
) -> Iterator[LongDocument | BadLine]:
    """The document of each line of a part of a JSON file, with texts that are too long for memory left in the file."""
    line = _JsonLine(keys)
    for number, (begin, length) in enumerate(_line_extents(path, start, size), start=first_line):
        try:
            content, names = skeleton(path, begin, length)
            texts = tuple(names.get(text, text) for text in line.parse(content))
            for long in names.values():
                # Every long string is decoded once before a token is made of it, so that a bad one leaves no trace.
                for _ in long.pieces():
                    pass
            yield texts
        except (_RefusedError, LongLineError) as error:
            yield BadLine(number, offset + begin - start, str(error))


def count_line_feeds(path: Path, size: int) -> int:
    """Line feeds in the first `size` bytes of a file."""
    found = 0
    with path.open("rb") as file:
        while size and (piece := file.read(min(4 * PIECE, size))):
            found += piece.count(b"\n")
            size -= len(piece)
    return found


def _line_extents(path: Path, start: int, size: int) -> Iterator[tuple[int, int]]:
    """Where each line of a part of a file starts, and its bytes without the line feed."""
    begin, at = start, start
    with path.open("rb") as file:
        file.seek(start)
        while at < start + size:
            piece = file.read(min(PIECE, start + size - at))
            found = piece.find(b"\n")
            while found >= 0:
                yield begin, at + found - begin
                begin = at + found + 1
                found = piece.find(b"\n", found + 1)
            at += len(piece)
    if begin < at:
        yield begin, at - begin


class _RefusedError(Exception):
    """Why a line gives no document."""


class _JsonLine:
    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = tuple(keys)
        self.decode = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant).decode

    def parse(self, line: bytes) -> Document:
        text = _decoded(line)
        try:
            found = self.decode(text)
        except json.JSONDecodeError as error:
            if not text.strip():
                raise _RefusedError("an empty line") from error
            raise _RefusedError(f"not JSON at character {error.pos + 1}: {error.msg}") from error
        except RecursionError as error:
            raise _RefusedError("nested too deeply") from error
        except ValueError as error:
            raise _RefusedError(f"not JSON: {error}") from error
        if not isinstance(found, dict):
            raise _RefusedError(f"{_kind(found)}, not an object")
        return tuple(self._text(found, key) for key in self.keys)

    def _text(self, found: dict[str, Any], key: str) -> str:
        if key not in found:
            raise _RefusedError(f"no key {key!r}; its keys are {', '.join(list(found)[:8]) or 'none'}")
        text = found[key]
        if not isinstance(text, str):
            raise _RefusedError(f"key {key!r} holds {_kind(text)}, not a string")
        try:
            # An escape such as \\ud800 alone is half of a character, which no tokenizer can take.
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _RefusedError(f"key {key!r} holds half a surrogate pair at character {error.start + 1}") from error
        return text


def _parse_text(line: bytes) -> Document:
    return (_decoded(line.removesuffix(b"\r")),)


def _decoded(line: bytes) -> str:
    if line.startswith(BOM):
        raise _RefusedError("a byte order mark; save the file as UTF-8 without one")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _RefusedError(
            f"not UTF-8: byte {line[error.start]:#04x} at byte {error.start + 1} of the line"
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RefusedError(f"key {twice!r} is there twice")
    return found


def _refuse_constant(name: str) -> None:
    raise _RefusedError(f"not JSON: {name} is no number")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
    }
    return names.get(type(value), "an object")

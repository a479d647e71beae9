"""JSON lines of any length in constant memory: long strings are left in the file and decoded piece by piece."""

from __future__ import annotations

import codecs
import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

LONG_LINE_BYTES = 8 << 20
"""Longer lines are read this way."""

LONG_STRING_BYTES = 1 << 20
SKELETON_BYTES = 64 << 20
"""What a line may hold beside its long strings."""

PIECE = 1 << 18

WITHIN_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
WHOLE_ESCAPES = re.compile(
    # Half of a surrogate pair must stay together with what follows it.
    rb"(?:[^\\]+|\\u(?![dD][89abAB])[^\\]{4}|\\u[dD][89abAB][^\\]{2}(?=.{6})(?:\\u[^\\]{4})?|\\[^u])*",
    re.DOTALL,
)


class LongLineError(Exception):
    """Why a long line gives no document."""


@dataclass(frozen=True)
class LongText:
    """A string that stays in its file, still escaped."""

    path: Path
    offset: int
    size: int

    def pieces(self) -> Iterator[str]:
        """The decoded text, in pieces that join to the whole.

        Raises: LongLineError for bytes and escapes that are no text.
        """
        with self.path.open("rb") as file:
            file.seek(self.offset)
            left, rest = self.size, b""
            while left or rest:
                raw = rest + file.read(min(PIECE, left))
                left = max(0, left - PIECE)
                stop = len(raw) if not left else _whole_end(raw)
                if stop == 0:
                    raise LongLineError("not JSON: a bad escape within a long string")
                yield _decoded(raw[:stop])
                rest = raw[stop:]


@dataclass(frozen=True)
class BufferText:
    """A string that stays in a buffer, as UTF-8."""

    data: memoryview

    def pieces(self) -> Iterator[str]:
        """The decoded text, in pieces that join to the whole.

        Raises: UnicodeDecodeError for bytes that are no text.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, len(self.data), PIECE):
            yield decoder.decode(self.data[start : start + PIECE], start + PIECE >= len(self.data))


def cut_before_spaces(text: str | LongText | BufferText) -> Iterator[str]:
    """A text in pieces that end after an ASCII letter or digit and before a space or line feed.

    Pre-tokenizers that never join these two into one piece give the same tokens for the pieces as for the whole.
    """
    held = ""
    for piece in _slices(text) if isinstance(text, str) else text.pieces():
        held += piece
        cut = _last_cut(held)
        if cut:
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _slices(text: str) -> Iterator[str]:
    return (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def skeleton(path: Path, offset: int, size: int) -> tuple[bytes, dict[str, LongText]]:
    """A line with its long strings replaced by names, and what each name stands for.

    Raises: LongLineError if what is left is too long as well.
    """
    mark = f"long-{uuid.uuid4().hex}-"
    found: dict[str, LongText] = {}
    parts: list[bytes] = []
    total = 0
    with path.open("rb") as file:
        file.seek(offset)
        for inside, begin, pieces, length in _strings(file, size):
            if inside and length > LONG_STRING_BYTES:
                name = f"{mark}{len(found)}"
                found[name] = LongText(path, offset + begin, length)
                pieces = [name.encode()]
            parts += pieces
            total += sum(map(len, pieces))
            if total > SKELETON_BYTES:
                raise LongLineError(f"more than {SKELETON_BYTES} bytes beside its long strings")
    return b"".join(parts), found


def _strings(file: IO[bytes], size: int) -> Iterator[tuple[bool, int, list[bytes], int]]:
    """What lies inside and outside of strings, by turns: (inside, start, pieces, length); long ones without pieces."""
    inside, begin, length = False, 0, 0
    pieces: list[bytes] = []
    at, rest = 0, b""
    while at < size:
        raw = rest + file.read(min(PIECE, size - at))
        at += len(raw) - len(rest)
        start = 0
        while start < len(raw):
            if inside:
                match = WITHIN_STRING.match(raw, start)
                stop = match.end() if match else start
            else:
                stop = raw.find(b'"', start)
                stop = len(raw) if stop < 0 else stop + 1
            length += stop - start
            if not inside or length <= LONG_STRING_BYTES:
                pieces.append(raw[start:stop])
            # A lone backslash at the end waits for the byte that it escapes.
            ended = stop < len(raw) and raw[stop : stop + 1] == b'"' if inside else raw[stop - 1 : stop] == b'"'
            start = stop
            if ended:
                yield inside, begin, pieces, length
                inside, begin, length, pieces = not inside, at - len(raw) + start, 0, []
            elif stop < len(raw):
                break
        rest = raw[start:]
        if rest and at >= size:
            pieces.append(rest)
            length += len(rest)
    yield inside, begin, pieces, length


def _whole_end(raw: bytes) -> int:
    """Where the last whole character ends."""
    match = WHOLE_ESCAPES.match(raw)
    stop = match.end() if match else 0
    back = stop
    while back > 0 and stop - back < 4 and raw[back - 1] & 0xC0 == 0x80:
        back -= 1
    if back > 0 and raw[back - 1] >= 0xC0:
        lead = raw[back - 1]
        needed = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        if stop - back + 1 < needed:
            return back - 1
    return stop


def _decoded(raw: bytes) -> str:
    try:
        text: str = json.loads(b'"' + raw + b'"')
        text.encode("utf-8")
    except UnicodeDecodeError as error:
        raise LongLineError(f"not UTF-8: byte {raw[max(0, error.start - 1)]:#04x} in a long string") from error
    except UnicodeEncodeError as error:
        raise LongLineError("half a surrogate pair in a long string") from error
    except ValueError as error:
        raise LongLineError(f"not JSON: {error}") from error
    return text


def _last_cut(text: str) -> int:
    """The last place between an ASCII letter or digit and a space or line feed; 0 if there is none."""
    at = len(text)
    while at > 0:
        at = max(text.rfind(" ", 0, at), text.rfind("\n", 0, at))
        if at <= 0:
            return 0
        before = text[at - 1]
        if before.isascii() and before.isalnum():
            return at
    return 0

"""Whether two libraries agree on which characters are letters and digits.

tiktoken and tokenizers each bring a table, of the version of Unicode that was current when they were built. What is a
letter to one of them alone is cut from the text around it in another way, and ids differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from megalm.tokenizers.byte_level import byte_of_character

CHARACTERS_AT_ONCE = 256
RANGES = (
    range(0x20, 0x3400),
    range(0x4DB0, 0x4E00),
    range(0x9FA0, 0xAC00),
    range(0xD7A0, 0xD800),
    range(0xF8F0, 0x17000),
    range(0x18CF0, 0x20000),
    range(0x20000, 0x34000, 16),
)
"""All code points below U+20000 but for surrogates, private ones and the inside of blocks that are all letters in every
version (ideographs, Hangul, Tangut); above, where ideographs are added by blocks, one of 16."""


def probe_model() -> dict[str, object]:
    """A vocabulary, as in tokenizer.json, that tells what is a letter or a digit: bytes, and `'s`.

    After either of them `'s` is a piece of its own, and one token; after anything else the apostrophe belongs to what
    is before it.
    """
    vocabulary = {character: number for number, character in enumerate(byte_of_character())}
    return {"type": "BPE", "vocab": {**vocabulary, "'s": len(vocabulary)}, "merges": [["'", "s"]]}


def first_difference(encode: Callable[[str], Sequence[int]], other: Callable[[str], Sequence[int]]) -> int | None:
    """The first code point that is a letter or a digit to one of two encoders of `probe_model` alone; 0.3 s."""
    for points in _points():
        if _ids(encode, points) != _ids(other, points):
            return next((point for point in points if _ids(encode, [point]) != _ids(other, [point])), points[0])
    return None


def _points() -> Iterator[list[int]]:
    for known in RANGES:
        for start in range(0, len(known), CHARACTERS_AT_ONCE):
            yield list(known[start : start + CHARACTERS_AT_ONCE])


def _ids(encode: Callable[[str], Sequence[int]], points: Sequence[int]) -> list[int]:
    return np.asarray(encode("".join(f"{chr(point)}'s" for point in points))).tolist()

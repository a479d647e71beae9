"""The documents of files one by one, for whoever needs texts rather than tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from megalm.data.bad_lines import shown
from megalm.data.documents import blocks
from megalm.data.inputs import Source
from megalm.data.long_line import LONG_LINE_BYTES
from megalm.errors import DataError

SAMPLE_DOCUMENTS = 64
SAMPLE_CHARACTERS = 1 << 18
SAMPLE_BLOCK = 1 << 16


def iterate_texts(
    sources: Sequence[Source],
    keys: Sequence[str],
    *,
    skip_bad_lines: bool = False,
    block_bytes: int = 1 << 20,
    longest: int | None = None,
) -> Iterator[str]:
    """Every text of the keys, in order; blocks of more than `longest` bytes are left out.

    Raises: DataError at the first bad line, unless such lines are skipped.
    """
    at, lines = -1, 0
    for block in blocks(sources, block_bytes=block_bytes):
        if longest is not None and block.size > longest:
            block.discard()
            continue
        at, lines = (at, lines) if block.source == at else (block.source, 0)
        number = 0
        for document in block.documents(keys):
            number += 1
            if isinstance(document, tuple):
                yield from (text for text in document if isinstance(text, str))
            elif not skip_bad_lines:
                raise DataError(f"{sources[block.source].path}, {shown(document.place(lines))}: {document.reason}")
        lines += number


def first_texts(sources: Sequence[Source], keys: Sequence[str]) -> list[str]:
    """Texts from the start of every file, at most 2^18 characters, to compare encoders on this very input."""
    found: list[str] = []
    left = SAMPLE_CHARACTERS
    each = max(1, SAMPLE_DOCUMENTS // max(1, len(sources)))
    for source in sources:
        for text in itertools.islice(
            iterate_texts([source], keys, skip_bad_lines=True, block_bytes=SAMPLE_BLOCK, longest=LONG_LINE_BYTES), each
        ):
            found.append(text[: 1 << 13])
            left -= len(found[-1])
        if left <= 0 or len(found) >= SAMPLE_DOCUMENTS:
            break
    return found

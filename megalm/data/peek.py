"""The documents of files one by one, for whoever needs texts rather than tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from megalm.data.documents import Source, blocks
from megalm.data.lines import BadLine, read_lines
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
    for block in blocks(sources, block_bytes=block_bytes):
        source = sources[block.source]
        if longest is not None and block.size > longest:
            block.discard()
            continue
        found = read_lines(
            block.read(), format_name=source.format, keys=keys, first_line=block.first_line, offset=block.offset
        )
        for document in found:
            if not isinstance(document, BadLine):
                yield from document
            elif not skip_bad_lines:
                raise DataError(f"{source.path}, line {document.line}, byte {document.offset}: {document.reason}")


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

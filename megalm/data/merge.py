"""Several corpora written one after the other as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalm.data.indexed import IndexedDataset
from megalm.data.indexed_writer import IndexedWriter
from megalm.errors import DataError

SEQUENCES = 1 << 18
"""Sequences copied at a time."""

TOKENS = 1 << 23
"""Tokens copied at a time, unless a single sequence is longer."""


def merge_datasets(prefixes: Sequence[str | Path], output: str | Path, *, overwrite: bool = False) -> IndexedDataset:
    """Write the documents of all corpora, in this order, as one corpus.

    The bytes are those that tokenizing the inputs one after the other would have given.
    Raises: DataError for corpora of different dtypes: their ids come from different tokenizers.
    """
    if not prefixes:
        raise DataError("no corpus to merge\n  give one prefix or more")
    parts = [IndexedDataset(prefix) for prefix in prefixes]
    if any(Path(part.prefix).resolve() == Path(output).resolve() for part in parts):
        raise DataError(f"{output} is both input and output")
    for part in parts[1:]:
        if part.dtype != parts[0].dtype:
            raise DataError(
                f"{part.prefix} holds {part.dtype.name} ids, {parts[0].prefix} holds {parts[0].dtype.name}\n"
                "  they were made with different tokenizers: tokenize them again with one"
            )
    with IndexedWriter(output, parts[0].dtype, overwrite=overwrite) as writer:
        for part in parts:
            _append(writer, part)
    return IndexedDataset(output)


def _append(writer: IndexedWriter, part: IndexedDataset) -> None:
    """Copy whole documents, many at a time."""
    document = 0
    starts = part.pointers // part.dtype.itemsize
    while document < part.num_documents:
        first = int(part.document_index[document])
        begin = int(starts[first]) if first < part.num_sequences else part.num_tokens
        by_tokens = int(np.searchsorted(starts, begin + TOKENS))
        last = max(first + 1, min(by_tokens, first + SEQUENCES))
        stop = max(document + 1, int(np.searchsorted(part.document_index, last, side="right")) - 1)
        bounds = np.asarray(part.document_index[document : stop + 1])
        lengths = np.asarray(part.lengths[bounds[0] : bounds[-1]])
        end = begin + int(lengths.sum(dtype=np.int64))
        writer.add_packed(part.tokens[begin:end], lengths, np.diff(bounds))
        document = stop

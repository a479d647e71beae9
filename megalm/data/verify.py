"""Proving that a corpus is what was written: structure, hashes, id ranges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megalm.data.indexed import IndexedDataset, index_path, sidecar_path, tokens_path
from megalm.data.sidecar import check_hash, read_sidecar
from megalm.errors import DataError

RUN = 1 << 24
"""Tokens looked at together."""


@dataclass(frozen=True)
class Verdict:
    """What was checked, for people to read."""

    prefix: str
    documents: int
    tokens: int
    largest_id: int
    hashed: bool
    """False if there is no sidecar, so that a changed token cannot be told from a right one."""
    vocab_size: int | None
    """What the ids were held against; None if neither the caller nor the sidecar says."""


def bytes_to_read(prefix: str) -> int:
    """What `verify_corpus` reads of a corpus, for a progress line; 0 if it is not there."""
    files = [path for path in (index_path(prefix), tokens_path(prefix), tokens_path(prefix)) if path.is_file()]
    hashed = sidecar_path(prefix).is_file()
    return sum(path.stat().st_size for path in (files if hashed else files[-1:]))


def verify_corpus(prefix: str, *, vocab_size: int | None = None, read: Callable[[int], None] | None = None) -> Verdict:
    """Read everything: the index as on opening, both files against their hashes, every id against the vocabulary.

    `read` hears of bytes as they are read.
    Raises: DataError that names the file and, for an id, the sequence and the token.
    """
    sidecar = read_sidecar(prefix)
    if sidecar is not None:
        check_hash(index_path(prefix), sidecar["files"]["idx"], read=read)
        check_hash(tokens_path(prefix), sidecar["files"]["bin"], read=read)
        if vocab_size is None:
            vocab_size = (sidecar.get("tokenizer") or {}).get("vocab_size")
    indexed = IndexedDataset(prefix)
    largest = -1
    for start in range(0, indexed.num_tokens, RUN):
        part = indexed.tokens[start : start + RUN]
        smallest, greatest = int(part.min()), int(part.max())
        if smallest < 0:
            _refuse(indexed, start + int(part.argmin()), f"is {smallest}; ids are 0 or more")
        if vocab_size is not None and greatest >= vocab_size:
            _refuse(indexed, start + int(part.argmax()), f"is {greatest}, outside of the vocabulary of {vocab_size}")
        largest = max(largest, greatest)
        if read is not None:
            read(part.nbytes)
    return Verdict(prefix, indexed.num_documents, indexed.num_tokens, largest, sidecar is not None, vocab_size)


def _refuse(indexed: IndexedDataset, position: int, what: str) -> None:
    address = position * indexed.dtype.itemsize
    sequence = int(np.searchsorted(indexed.pointers, address, side="right")) - 1
    token = (address - int(indexed.pointers[sequence])) // indexed.dtype.itemsize
    raise DataError(
        f"{tokens_path(indexed.prefix)}: the id of sequence {sequence}, token {token}, {what}\n"
        "  another tokenizer made the corpus, or the file is damaged: name that tokenizer, or tokenize the text again"
    )

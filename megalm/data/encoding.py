"""Turning blocks of lines into packed token arrays: the part of preprocessing that worker processes do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.documents import Block
from megalm.data.lines import BadLine
from megalm.data.long_line import LONG_STRING_BYTES, BufferText, LongText, cut_before_spaces
from megalm.data.parquet import BadRow
from megalm.errors import DataError

EncodeText = Callable[[str], Sequence[int]]
SplitSentences = Callable[[str], Sequence[str]]


@dataclass(frozen=True)
class Recipe:
    """How one document becomes tokens. It travels to the workers by fork, not by pickle."""

    encode: EncodeText
    vocab_size: int
    dtype: np.dtype[Any]
    keys: tuple[str, ...] = ("text",)
    eod_id: int | None = None
    """Appended to every document that is not empty."""
    split_sentences: SplitSentences | None = None
    splittable: bool = False
    """Whether a text cut between a letter or digit and a space gives the same ids in pieces as in one."""


@dataclass
class Packed:
    """Token ids of many documents of one key, back to back."""

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    """Tokens of each sequence."""
    sentences: npt.NDArray[np.int32]
    """Sequences of each document."""


@dataclass
class Encoded:
    """What a block gave."""

    packed: dict[str, Packed]
    num_documents: int = 0
    num_empty: int = 0
    """Documents without a single token in some key; like the other trainers' tools, the corpus leaves them out."""
    bad: list[BadLine | BadRow] = field(default_factory=list)

    @property
    def num_lines(self) -> int:
        """Lines or rows that were read."""
        return self.num_documents + len(self.bad)


def encode_block(block: Block, recipe: Recipe) -> Encoded:
    """Tokenize the documents of a block.

    Raises: DataError for an id that does not fit the vocabulary or the dtype.
    """
    packers = [_Packer(recipe) for _ in recipe.keys]
    result = Encoded({})
    found = block.documents(recipe.keys, by_pieces=recipe.splittable and recipe.split_sentences is None)
    for document in found:
        if isinstance(document, (BadLine, BadRow)):
            result.bad.append(document)
            continue
        result.num_documents += 1
        kept = [packer.add(text) for packer, text in zip(packers, document, strict=True)]
        result.num_empty += not all(kept)
    block.discard()
    for key, packer in zip(recipe.keys, packers, strict=True):
        result.packed[key] = packer.packed()
    return result


class _Packer:
    """Gathers the ids of one key."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._parts: list[npt.NDArray[Any]] = []
        self._lengths: list[int] = []
        self._sentences: list[int] = []
        self._end = np.array([recipe.eod_id], recipe.dtype) if recipe.eod_id is not None else None

    def add(self, text: str | LongText | BufferText) -> bool:
        """Append a document; False if it gave no token and so is left out."""
        if not isinstance(text, str):
            lengths = [self._append(cut_before_spaces(text))]
        elif self.recipe.split_sentences is not None:
            lengths = [self._append([sentence]) for sentence in self.recipe.split_sentences(text)]
        elif self.recipe.splittable and len(text) > LONG_STRING_BYTES:
            lengths = [self._append(cut_before_spaces(text))]
        else:
            lengths = [self._append([text])]
        lengths = [length for length in lengths if length]
        if not lengths:
            return False
        if self._end is not None:
            self._parts.append(self._end)
            lengths[-1] += 1
        self._lengths += lengths
        self._sentences.append(len(lengths))
        return True

    def _append(self, pieces: Iterable[str]) -> int:
        """Append the ids of a sequence that comes in pieces; returns how many there are."""
        count = 0
        for piece in pieces:
            ids = np.asarray(self.recipe.encode(piece), np.int64)
            if len(ids):
                self._check(ids)
                self._parts.append(ids.astype(self.recipe.dtype))
                count += len(ids)
        return count

    def packed(self) -> Packed:
        """All documents so far."""
        tokens = np.empty(sum(map(len, self._parts)), self.recipe.dtype)
        filled = 0
        # A part is let go as soon as it is copied, so that a long document is not in memory twice.
        while self._parts:
            part = self._parts.pop()
            tokens[len(tokens) - filled - len(part) : len(tokens) - filled] = part
            filled += len(part)
        return Packed(tokens, np.array(self._lengths, np.int32), np.array(self._sentences, np.int32))

    def _check(self, ids: npt.NDArray[np.int64]) -> None:
        largest, smallest = int(ids.max()), int(ids.min())
        limit = min(self.recipe.vocab_size, int(np.iinfo(self.recipe.dtype).max) + 1)
        if smallest < 0 or largest >= limit:
            raise DataError(
                f"the tokenizer gave id {largest if largest >= limit else smallest}, "
                f"outside of its {self.recipe.vocab_size} ids stored as {self.recipe.dtype.name}\n"
                "  its files do not fit together"
            )

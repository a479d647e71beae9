"""Turning blocks of lines into packed token arrays: the part of preprocessing that worker processes do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.documents import Block
from megalm.data.lines import BadLine, read_lines
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
    bad: list[BadLine] = field(default_factory=list)


def encode_block(block: Block, format_name: str, recipe: Recipe) -> Encoded:
    """Tokenize the documents of a block.

    Raises: DataError for an id that does not fit the vocabulary or the dtype.
    """
    packers = [_Packer(recipe) for _ in recipe.keys]
    result = Encoded({})
    found = read_lines(
        block.read(), format_name=format_name, keys=recipe.keys, first_line=block.first_line, offset=block.offset
    )
    for document in found:
        if isinstance(document, BadLine):
            result.bad.append(document)
            continue
        result.num_documents += 1
        kept = [packer.add(text) for packer, text in zip(packers, document, strict=True)]
        result.num_empty += not all(kept)
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

    def add(self, text: str) -> bool:
        """Append a document; False if it gave no token and so is left out."""
        texts = (text,) if self.recipe.split_sentences is None else self.recipe.split_sentences(text)
        count = 0
        for part in texts:
            ids = np.asarray(self.recipe.encode(part), np.int64)
            if not len(ids):
                continue
            self._check(ids)
            self._parts.append(ids.astype(self.recipe.dtype))
            self._lengths.append(len(ids))
            count += 1
        if not count:
            return False
        if self._end is not None:
            self._parts.append(self._end)
            self._lengths[-1] += 1
        self._sentences.append(count)
        return True

    def packed(self) -> Packed:
        """All documents so far."""
        tokens = np.concatenate(self._parts) if self._parts else np.empty(0, self.recipe.dtype)
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

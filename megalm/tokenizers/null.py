"""Text that is already token ids, separated by white space: for tests and for corpora tokenized elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from megalm.errors import DataError


class NullTokenizer:
    """Ids 0 to vocab_size - 1 as written; one more id ends a document."""

    def __init__(self, num_ids: int) -> None:
        if num_ids < 1:
            raise DataError(f"NullTokenizer with {num_ids} ids; it needs at least 1\n  set --vocab-size")
        self._num_ids = num_ids

    @property
    def name(self) -> str:
        """Its type and size, for logs."""
        return f"NullTokenizer {self._num_ids}"

    @property
    def vocab_size(self) -> int:
        """The ids and the end of document."""
        return self._num_ids + 1

    @property
    def eod_id(self) -> int | None:
        """The id after the last ordinary one."""
        return self._num_ids

    @property
    def digest(self) -> str:
        """sha256 of the name, which says everything."""
        return hashlib.sha256(self.name.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The numbers in the text."""
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(f"NullTokenizer reads whole numbers; {error}") from error
        for id in ids:
            if not 0 <= id <= self._num_ids:
                raise DataError(f"token id {id} is outside of 0 to {self._num_ids}")
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The numbers in each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The numbers, separated by spaces."""
        return " ".join(str(int(id)) for id in ids)

    def save_pretrained(self, folder: str | Path) -> None:
        """Nothing: transformers has no such tokenizer, and numbers need none."""

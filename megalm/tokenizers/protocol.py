"""What the tools and the trainer ask of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def name(self) -> str:
        """Its type and where it was read from, for logs."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""

    @property
    def eod_id(self) -> int | None:
        """The id that ends a document; None if the tokenizer names none."""

    @property
    def digest(self) -> str:
        """sha256 of the files that decide the ids."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files from which transformers' AutoTokenizer reads the same tokenizer."""

"""SentencePiece `.model` files, BPE or unigram."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.errors import DataError
from megalm.tokenizers.files import digest_of, write_json
from megalm.tokenizers.huggingface import fast_config


class SentencePieceTokenizer:
    """The ids that a SentencePiece model gives, without marks of begin and end."""

    def __init__(self, path: str | Path) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise DataError(
                "SentencePieceTokenizer needs the sentencepiece package\n  pip install 'megalm[hf]'"
            ) from error
        self.path = _model_file(Path(path))
        self.backend: Any = sentencepiece.SentencePieceProcessor()
        try:
            self.backend.Load(str(self.path))
        except (OSError, RuntimeError) as error:
            raise DataError(f"{self.path} is no SentencePiece model: {error}") from error

    @property
    def name(self) -> str:
        """Its type and where it was read from, for logs."""
        return f"SentencePieceTokenizer {self.path}"

    @property
    def vocab_size(self) -> int:
        """Pieces of the model."""
        return int(self.backend.GetPieceSize())

    @property
    def eod_id(self) -> int | None:
        """The model's end-of-sentence piece, if it has one."""
        end = int(self.backend.eos_id())
        return end if end >= 0 else None

    @property
    def digest(self) -> str:
        """sha256 of the model."""
        return digest_of(self.path)

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ids: list[int] = self.backend.EncodeAsIds(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [self.backend.EncodeAsIds(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids."""
        text: str = self.backend.DecodeIds([int(id) for id in ids])
        return text

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json with the same ids, and copy the model beside it.

        Raises: DataError if tokenizer.json cannot express the model.
        """
        from megalm.tokenizers.sentencepiece_export import to_tokenizers

        converted = to_tokenizers(self.backend)
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        converted.save(str(target / "tokenizer.json"))
        if (target / "tokenizer.model").resolve() != self.path.resolve():
            shutil.copyfile(self.path, target / "tokenizer.model")
        end = self.eod_id
        write_json(target / "tokenizer_config.json", fast_config(None if end is None else self.backend.IdToPiece(end)))


def _model_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("*.model")) if path.is_dir() else []
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} .model files" if path.is_dir() else "no such file"
    raise DataError(f"no SentencePiece model at {path}: {what}\n  give the .model file itself")

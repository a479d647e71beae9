"""SentencePiece `.model` files, BPE or unigram."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.errors import DataError
from megalm.tokenizers.files import digest_of, write_json


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
        """Copy the model beside a configuration that names its special pieces."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        if (target / "tokenizer.model").resolve() != self.path.resolve():
            shutil.copyfile(self.path, target / "tokenizer.model")
        config: dict[str, Any] = {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": False,
            "add_eos_token": False,
            "legacy": True,
            "clean_up_tokenization_spaces": False,
        }
        marks = {
            "unk_token": self.backend.unk_id(),
            "bos_token": self.backend.bos_id(),
            "eos_token": self.backend.eos_id(),
        }
        config.update({name: self.backend.IdToPiece(id) for name, id in marks.items() if id >= 0})
        write_json(target / "tokenizer_config.json", config)


def _model_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("*.model")) if path.is_dir() else []
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} .model files" if path.is_dir() else "no such file"
    raise DataError(f"no SentencePiece model at {path}: {what}\n  give the .model file itself")

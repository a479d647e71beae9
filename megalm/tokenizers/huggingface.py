"""Hugging Face tokenizer folders, read by the `tokenizers` library alone: importing transformers costs seconds."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.errors import DataError
from megalm.tokenizers.files import digest_of, read_json, write_json

if TYPE_CHECKING:
    import tokenizers

COPIED = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt")
"""Files that belong to a tokenizer folder beside tokenizer.json."""

END_NAMES = ("<|endoftext|>", "</s>", "<eod>", "<EOD>", "<|end_of_text|>", "[EOD]")
"""Tokens that end a document by convention, where no file names one."""


class HuggingFaceTokenizer:
    """The tokenizer that a `tokenizer.json` describes."""

    def __init__(self, path: str | Path) -> None:
        import tokenizers

        self.path = _tokenizer_file(Path(path))
        try:
            self.backend: tokenizers.Tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
        # The library raises its errors as plain Exception.
        except Exception as error:
            raise DataError(f"{self.path} is no tokenizer that the tokenizers library reads: {error}") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self._vocab_size = max(vocabulary.values()) + 1
        self._eod_id = _end_of_document(self.path.parent, vocabulary)

    @property
    def name(self) -> str:
        """Its type and where it was read from, for logs."""
        return f"PretrainedFromHF {self.path}"

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self._vocab_size

    @property
    def eod_id(self) -> int | None:
        """The id of eos_token, or of a token that ends documents by convention."""
        return self._eod_id

    @property
    def digest(self) -> str:
        """sha256 of tokenizer.json."""
        return digest_of(self.path)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens that the tokenizer's own template adds."""
        ids: list[int] = self.backend.encode(text).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=False)
        return text

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the folder's files, and write a tokenizer_config.json where there was none."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        _copy(self.path, target / "tokenizer.json")
        for name in COPIED:
            source = self.path.parent / name
            if source.is_file() and self.path.name == "tokenizer.json":
                _copy(source, target / name)
        if not (target / "tokenizer_config.json").exists():
            end = None if self._eod_id is None else self.backend.id_to_token(self._eod_id)
            write_json(target / "tokenizer_config.json", fast_config(end))


def fast_config(end_of_text: str | None) -> dict[str, Any]:
    """A tokenizer_config.json with which AutoTokenizer takes tokenizer.json as it is."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
    }
    if end_of_text is not None:
        config["eos_token"] = end_of_text
    return config


def _copy(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)


def _tokenizer_file(path: Path) -> Path:
    if path.is_file():
        return path
    if (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    if path.is_dir():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        raise DataError(
            f"{path} holds no tokenizer.json; it holds {found}\n"
            "  for vocab.json and merges.txt use --tokenizer-type GPT2BPETokenizer, "
            "for a .model file SentencePieceTokenizer"
        )
    return _from_hub(path)


def _from_hub(path: Path) -> Path:
    """A name such as bigscience/tokenizer, if the hub's cache on this machine holds it; nothing is downloaded."""
    name = str(path)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise DataError(f"no tokenizer at {path}: there is no such file or folder")
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(name, allow_patterns=["tokenizer.json", *COPIED], local_files_only=True)
    # The hub's client has a dozen error classes; here they all mean that the name is not in the cache.
    except Exception as error:
        raise DataError(
            f"no tokenizer folder {name} in {Path.cwd()}, and the hub's cache on this machine holds none of that name\n"
            f"  give the folder's whole path; or download it (hf download {name} --local-dir FOLDER) and give FOLDER"
        ) from error
    return _tokenizer_file(Path(folder))


def _end_of_document(folder: Path, vocabulary: dict[str, int]) -> int | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        token = read_json(path).get("eos_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content is None:
            continue
        if not isinstance(content, str):
            raise DataError(f"{path}: eos_token is {content!r}, and one token can end documents\n  name it by its text")
        if content not in vocabulary:
            raise DataError(f"{path} names eos_token {content!r}, which {folder / 'tokenizer.json'} does not hold")
        return vocabulary[content]
    return next((vocabulary[name] for name in END_NAMES if name in vocabulary), None)

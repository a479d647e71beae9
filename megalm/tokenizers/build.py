"""The tokenizer that the configuration names."""

from __future__ import annotations

from pathlib import Path

from megalm.config.data import DataConfig
from megalm.errors import DataError
from megalm.tokenizers.protocol import Tokenizer


def build_tokenizer(data: DataConfig, *, vocab_size: int | None = None) -> Tokenizer:
    """Read the tokenizer of the data section. `vocab_size` is that of NullTokenizer.

    Raises: DataError if files are missing, broken, or not those of the type.
    """
    return open_tokenizer(
        data.tokenizer_type,
        path=data.tokenizer_path,
        vocab_file=data.vocab_file,
        merge_file=data.merge_file,
        vocab_size=vocab_size,
    )


def data_fields(folder: Path) -> dict[str, str]:
    """The fields of the data section that name the tokenizer whose files a folder holds; none if it holds none."""
    if (folder / "tokenizer.json").is_file():
        return {"tokenizer_path": str(folder)}
    vocab_file, merge_file = folder / "vocab.json", folder / "merges.txt"
    if vocab_file.is_file() and merge_file.is_file():
        return {
            "tokenizer_type": "GPT2BPETokenizer",
            "vocab_file": str(vocab_file),
            "merge_file": str(merge_file),
        }
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_path": str(models[0])}
    return {}


def tokenizer_in(place: str) -> Tokenizer:
    """The tokenizer whose files a folder holds, of whatever type; a tokenizer.json or .model file; a name of the hub.

    Raises: DataError if there is none, or it cannot be read.
    """
    if place.endswith(".model"):
        return open_tokenizer("SentencePieceTokenizer", path=place)
    fields = data_fields(Path(place))
    return open_tokenizer(
        fields.get("tokenizer_type", "PretrainedFromHF"),
        path=fields.get("tokenizer_path", place),
        vocab_file=fields.get("vocab_file"),
        merge_file=fields.get("merge_file"),
    )


def open_tokenizer(
    kind: str,
    *,
    path: str | None = None,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    vocab_size: int | None = None,
) -> Tokenizer:
    """Read a tokenizer of the named type, with the modules of that type alone."""
    if kind == "PretrainedFromHF":
        from megalm.tokenizers.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(_given(path, kind, "--tokenizer-name-or-path FOLDER"))
    if kind == "GPT2BPETokenizer":
        from megalm.tokenizers.gpt2_bpe import GPT2BPETokenizer

        return GPT2BPETokenizer(
            _given(vocab_file, kind, "--vocab-file vocab.json"), _given(merge_file, kind, "--merge-file merges.txt")
        )
    if kind == "SentencePieceTokenizer":
        from megalm.tokenizers.sentencepiece_model import SentencePieceTokenizer

        return SentencePieceTokenizer(_given(path, kind, "--tokenizer-name-or-path FILE.model"))
    if kind == "NullTokenizer":
        from megalm.tokenizers.null import NullTokenizer

        if vocab_size is None:
            raise DataError("NullTokenizer needs the number of ids\n  pass --vocab-size")
        return NullTokenizer(vocab_size)
    raise DataError(
        f"tokenizer type {kind!r} does not exist\n"
        "  types that do: PretrainedFromHF, GPT2BPETokenizer, SentencePieceTokenizer, NullTokenizer"
    )


def _given(value: str | None, kind: str, flag: str) -> str:
    if value is None:
        raise DataError(f"tokenizer type {kind} needs {flag}")
    return value

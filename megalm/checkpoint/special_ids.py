"""The ids that begin, end and pad texts, as an export's config.json says them and an import keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalm.checkpoint import layout
from megalm.checkpoint.huggingface import GPT2
from megalm.checkpoint.source import read_train_state
from megalm.tokenizers.files import read_json

KINDS = ("bos", "eos", "pad")
KEPT = "huggingface"
"""Key of train_state.json with what config.json of an imported folder says and no option does."""
KEPT_KEYS = (*(f"{kind}_token_id" for kind in KINDS), "embd_pdrop")

# Tokens that a class has where no file names them.
_OF_CLASS = {"GPT2Tokenizer": {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}}


def kept_of(content: Mapping[str, Any], *, vocab_size: int) -> dict[str, Any]:
    """What an import keeps of config.json, which comes with transformers' defaults.

    An id without a row of word embedding, as GPT-2's default is in a small model, tells nothing and is not kept.
    Raises: ValueError.
    """
    kept = {key: content[key] for key in KEPT_KEYS if key in content}
    for kind in KINDS:
        key = f"{kind}_token_id"
        value = kept[key]
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(id) is int for id in ids):
            raise ValueError(f"{key} = {value!r} must be a whole number, a list of them, or null")
        if not all(0 <= id < vocab_size for id in ids):
            del kept[key]
    return kept


def kept_by(checkpoint: Path) -> dict[str, Any]:
    """What the import that wrote a checkpoint kept; nothing where none did.

    Raises: CheckpointError if train_state.json cannot be read.
    """
    if not (checkpoint / layout.TRAIN_STATE).is_file():
        return {}
    kept = read_train_state(checkpoint).get(KEPT)
    return {key: kept[key] for key in KEPT_KEYS if key in kept} if isinstance(kept, dict) else {}


def ids_of_tokenizer(folder: Path, *, family: str) -> dict[str, int]:
    """The ids that AutoTokenizer gives for the tokens that the tokenizer's files in a folder name.

    Raises: DataError if a file is broken.
    """
    named = _named_tokens(folder, family=family) if (folder / "tokenizer.json").is_file() else {}
    if not named:
        return {}
    from megalm.tokenizers.huggingface import HuggingFaceTokenizer

    backend = HuggingFaceTokenizer(folder).backend
    ids = {kind: backend.token_to_id(token) for kind, token in named.items()}
    return {f"{kind}_token_id": id for kind, id in ids.items() if id is not None}


def special_ids(tokenizer: Mapping[str, int], kept: Mapping[str, Any], *, eod_id: int | None) -> dict[str, Any]:
    """Each id by the first that knows of it: the tokenizer's files, an import, the end of document; otherwise None."""
    keys = [f"{kind}_token_id" for kind in KINDS]
    return {key: tokenizer[key] if key in tokenizer else kept.get(key, eod_id) for key in keys}


def _named_tokens(folder: Path, *, family: str) -> dict[str, str]:
    """Tokens by kind, from the files in transformers' order."""
    current, older = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    content = read_json(current) if current.is_file() else {}
    if "added_tokens_decoder" not in content and older.is_file():
        content = {**content, **read_json(older)}
    kind_of_class = content.get("tokenizer_class", "GPT2Tokenizer" if family == GPT2 else "")
    of_class = _OF_CLASS.get(str(kind_of_class).removesuffix("Fast"), {})
    found = {}
    for kind in KINDS:
        token = content.get(f"{kind}_token", of_class.get(kind))
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[kind] = text
    return found

"""Hugging Face folders from anywhere: read as data, checked before anything is allocated, nothing in them run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megalm.checkpoint.huggingface import BLOOM, GPT2
from megalm.checkpoint.identity import check_sizes
from megalm.checkpoint.manifest import check_file_name
from megalm.checkpoint.special_ids import kept_of
from megalm.checkpoint.tensor_files import read_tensors
from megalm.config.model import ModelConfig
from megalm.errors import CheckpointError

_MAX_JSON_BYTES = 64 * 1024 * 1024
_GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu_erf"}
# Settings that change what a family computes into something megalm's blocks do not: (key, value that is fine).
_ONLY = {
    BLOOM: {"apply_residual_connection_post_layernorm": False},
    GPT2: {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
}
# Other names that transformers takes for a key (its attribute_map), and that win where both are there, as with it.
_OTHER_NAMES = {
    BLOOM: {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "n_embed": "hidden_size"},
    GPT2: {
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
    },
}
# What a key that is not there means: the defaults of transformers 5.23's BloomConfig and GPT2Config.
_DEFAULTS: dict[str, dict[str, Any]] = {
    BLOOM: {
        "vocab_size": 250880,
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 8,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    },
    GPT2: {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": None,
    },
}


@dataclass(frozen=True)
class ForeignModel:
    """What config.json says."""

    family: str
    model: ModelConfig
    seq_length: int | None
    dtype: str | None
    kept: Mapping[str, Any]
    """By key of config.json: what no option says, for an export to say again."""


def read_foreign_config(folder: Path) -> ForeignModel:
    """Read config.json of a Bloom or GPT-2 folder.

    Raises: CheckpointError if it is missing, needs code of its own, or describes what megalm cannot compute.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no Hugging Face folder: it has no config.json")
    content = read_json(path)
    if "auto_map" in content:
        raise CheckpointError(
            f"{path} has an auto_map: the model needs Python code that comes with it, and megalm runs no such code"
        )
    family = content.get("model_type")
    if family not in _ONLY:
        raise CheckpointError(f"{path}: model_type = {family!r} must be bloom or gpt2")
    for key, expected in _ONLY[family].items():
        if content.get(key, expected) != expected:
            raise CheckpointError(
                f"{path}: {key} = {content[key]!r} must be {expected!r}: megalm computes no other form"
            )
    if content.get("slow_but_exact") and content.get("pretraining_tp", 1) != 1:
        raise CheckpointError(
            f"{path}: slow_but_exact = True with pretraining_tp = {content['pretraining_tp']!r} makes transformers "
            "leave out the biases of two products in each block\n"
            "  set slow_but_exact to false, as in BLOOM's own folders"
        )
    content = _as_transformers_reads(content, family=family)
    try:
        model = _bloom(content) if family == BLOOM else _gpt2(content)
        check_sizes(model)
        kept = kept_of(content, vocab_size=model.padded_vocab_size)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes no {family} that megalm can build: {error}") from error
    length = content.get("seq_length") if family == BLOOM else model.max_position_embeddings
    stored = content.get("dtype", content.get("torch_dtype"))
    dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(str(stored))
    return ForeignModel(family, model, length if type(length) is int and 0 < length <= 2**26 else None, dtype, kept)


def _as_transformers_reads(content: Mapping[str, Any], *, family: str) -> dict[str, Any]:
    """The same under one name a key, with what is not there."""
    others = {key: content[name] for name, key in _OTHER_NAMES[family].items() if content.get(name) is not None}
    return {**_DEFAULTS[family], **content, **others}


def _bloom(content: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(
        num_layers=content["n_layer"],
        hidden_size=content["hidden_size"],
        num_heads=content["n_head"],
        position_embedding="alibi",
        embed_layernorm=True,
        layernorm_epsilon=_positive(content["layer_norm_epsilon"]),
        hidden_dropout=_probability(content["hidden_dropout"]),
        attention_dropout=_probability(content["attention_dropout"]),
        init_std=_positive(content["initializer_range"]),
        vocab_size=content["vocab_size"],
        pad_vocab_size_to=content["vocab_size"],
    )


def _gpt2(content: Mapping[str, Any]) -> ModelConfig:
    activation = content["activation_function"]
    if activation not in _GELUS:
        raise ValueError(f"activation_function = {activation!r} must be one of {', '.join(_GELUS)}")
    _probability(content["embd_pdrop"])  # kept for an export: here the embedding has hidden_dropout
    return ModelConfig(
        num_layers=content["n_layer"],
        hidden_size=content["n_embd"],
        num_heads=content["n_head"],
        ffn_hidden_size=content["n_inner"],
        max_position_embeddings=content["n_positions"],
        activation=_GELUS[activation],
        tie_embeddings=bool(content["tie_word_embeddings"]),
        layernorm_epsilon=_positive(content["layer_norm_epsilon"]),
        hidden_dropout=_probability(content["resid_pdrop"]),
        attention_dropout=_probability(content["attn_pdrop"]),
        init_std=_positive(content["initializer_range"]),
        vocab_size=content["vocab_size"],
        pad_vocab_size_to=content["vocab_size"],
    )


def _positive(value: Any) -> float:
    number = float(value)
    if not 0.0 < number < 1e3:
        raise ValueError(f"{value!r} must be a small positive number")
    return number


def _probability(value: Any) -> float:
    number = float(value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"dropout {value!r} must be at least 0 and less than 1")
    return number


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of reasonable size.

    Raises: CheckpointError.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than any such file ({_MAX_JSON_BYTES} bytes)")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


@dataclass
class ForeignWeights:
    """The tensors of a Hugging Face folder, by name without the `transformer.` prefix, read one at a time."""

    folder: Path
    _files: dict[str, tuple[Path, str]] = field(init=False)
    """By short name: file and name in it."""
    _open: tuple[Path, Any] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._files = {}
        for path, names in self._listing():
            for name in names:
                short = name.removeprefix("transformer.")
                if short in self._files:
                    raise CheckpointError(f"{self.folder} has {short} twice")
                self._files[short] = (path, name)

    def names(self) -> set[str]:
        """Short names of all tensors."""
        return set(self._files)

    def read(self, short: str) -> Tensor:
        """One tensor.

        Raises: CheckpointError if it is missing or unreadable.
        """
        if short not in self._files:
            raise CheckpointError(f"{self.folder} has no tensor {short}")
        path, name = self._files[short]
        try:
            source = self._opened(path)
            tensor = source.get_tensor(name) if hasattr(source, "get_tensor") else source[name]
        except CheckpointError:
            raise
        except Exception as error:  # safetensors raises its own type, and others by version
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from error
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name} is no tensor")
        return tensor

    def _listing(self) -> Iterator[tuple[Path, list[str]]]:
        """In transformers' order: a single file before an index, which may be an older model's."""
        for suffix in ("safetensors", "bin"):
            stem = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
            index = self.folder / f"{stem}.index.json"
            if (self.folder / stem).is_file():
                yield self.folder / stem, self._names_in(self.folder / stem)
                return
            if index.is_file():
                for name in _shards_of(index):
                    yield self.folder / name, self._names_in(self.folder / name)
                return
        raise CheckpointError(f"{self.folder} holds no model.safetensors and no pytorch_model.bin")

    def _names_in(self, path: Path) -> list[str]:
        source = self._opened(path)
        names = list(source.keys())
        if not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{path} names tensors by something other than text")
        return names

    def _opened(self, path: Path) -> Any:
        """The file, kept open until another one is asked for."""
        if self._open is None or self._open[0] != path:
            self._open = (path, _open_tensors(path))
        return self._open[1]


def _shards_of(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    names = []
    for name in weight_map.values():
        try:
            check_file_name(name)
        except ValueError as error:
            raise CheckpointError(f"{index}: {error}") from error
        names.append(name)
    return sorted(set(names))


def _open_tensors(path: Path) -> Any:
    if path.suffix == ".bin":
        state = read_tensors(path, allowed=())
        if not isinstance(state, dict):
            raise CheckpointError(f"{path} holds no state dict")
        return state
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error

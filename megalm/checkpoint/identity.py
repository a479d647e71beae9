"""Which model and which run a checkpoint is of, and whether its weights mean the same in another one."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from megalm.checkpoint import layout
from megalm.checkpoint.manifest import Manifest
from megalm.config.model import ModelConfig
from megalm.config.root import Config
from megalm.config.yaml_file import config_from_yaml
from megalm.errors import CheckpointError

# These change how weights are drawn, dropped or counted, not what they compute.
_NOT_THE_MODEL = {
    "hidden_dropout",
    "attention_dropout",
    "init_std",
    "vocab_size",
    "pad_vocab_size_to",
    "make_vocab_size_divisible_by",
}


def model_fields(config: Config) -> dict[str, Any]:
    """What the manifest says about the model of a run."""
    return resolved_fields(config.model, seq_length=config.data.seq_length)


def resolved_fields(model: ModelConfig, *, seq_length: int | None) -> dict[str, Any]:
    """Every field of a model, with sizes that are derived when not given resolved."""
    learned = model.position_embedding == "learned"
    return {
        **asdict(model),
        "ffn_hidden_size": model.ffn_size,
        "max_position_embeddings": (model.max_position_embeddings or seq_length) if learned else None,
        "pad_vocab_size_to": model.padded_vocab_size,
    }


def read_config(folder: Path) -> Config | None:
    """The configuration of the run that wrote a checkpoint; None if it has none.

    Raises: CheckpointError if it cannot be read, or ConfigError if this version of megalm does not know its fields.
    """
    file = folder / layout.CONFIG
    if not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    try:
        return _as_run(config_from_yaml(text, name=str(file)))
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file} is no configuration: {reason}") from error


def as_given(config: Config) -> Config:
    """A run's configuration as options give it: NullTokenizer adds the end of document to the ids that it is given.

    A stored configuration can be given again, so that it must not count that id.
    """
    return _with_more_ids(config, -1)


def _as_run(config: Config) -> Config:
    return _with_more_ids(config, 1)


def _with_more_ids(config: Config, count: int) -> Config:
    vocab_size = config.model.vocab_size
    if config.data.tokenizer_type != "NullTokenizer" or vocab_size is None:
        return config
    return replace(config, model=replace(config.model, vocab_size=vocab_size + count))


def stored_model(manifest: Manifest, *, path: Path) -> ModelConfig:
    """The model that a checkpoint holds.

    Raises: CheckpointError if the manifest describes none that this version of megalm can build.
    """
    try:
        model = ModelConfig(**manifest.model)
        check_sizes(model)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path / layout.MANIFEST} describes no model that megalm can build: {error}") from error
    return model


def check_sizes(model: ModelConfig) -> None:
    """Refuse sizes that no model has, before anything is allocated for them.

    Raises: ValueError.
    """
    limits = {
        "num_layers": 10_000,
        "hidden_size": 2**20,
        "num_heads": 2**16,
        "ffn_size": 2**23,
        "padded_vocab_size": 2**26,
    }
    for name, limit in limits.items():
        value = getattr(model, name)
        if type(value) is not int or not 1 <= value <= limit:
            raise ValueError(f"{name} = {value!r} must be a whole number from 1 to {limit}")
    if model.hidden_size % model.num_heads != 0:
        raise ValueError(f"num_heads = {model.num_heads} must divide hidden_size = {model.hidden_size}")
    rows = model.max_position_embeddings
    if rows is not None and (type(rows) is not int or not 1 <= rows <= 2**26):
        raise ValueError(f"max_position_embeddings = {rows!r} must be a whole number from 1 to {2**26}")


def check_same_model(manifest: Manifest, config: Config, *, path: Path) -> None:
    """Refuse to load weights into a model that gives them another meaning.

    Raises: CheckpointError that lists every field of the model that differs.
    """
    current = model_fields(config)
    differences = [
        f"  model.{name}: {manifest.model.get(name)!r} in the checkpoint, {value!r} in this run"
        for name, value in current.items()
        if name not in _NOT_THE_MODEL and manifest.model.get(name) != value
    ]
    rows, needed = config.model.padded_vocab_size, manifest.model.get("vocab_size")
    if not isinstance(needed, int):
        needed = manifest.model.get("pad_vocab_size_to")  # Which of its rows are padding is not known.
    if isinstance(needed, int) and rows < needed:
        differences.append(f"  model.pad_vocab_size_to: {needed} ids in the checkpoint, {rows} rows in this run")
    if differences:
        raise CheckpointError(
            "\n".join([f"{path} was made for another model", *differences, "  give this run the checkpoint's model"])
        )

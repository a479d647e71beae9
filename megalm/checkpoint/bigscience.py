"""Checkpoints that BigScience's Megatron-DeepSpeed wrote: BLOOM's own format, without a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalm.checkpoint import layout
from megalm.checkpoint.identity import check_sizes, resolved_fields
from megalm.checkpoint.inert import InertObject, read_with_stand_ins
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.merge import tensor_parallel_size
from megalm.config.model import ModelConfig
from megalm.errors import CheckpointError
from megalm.models.gpt.weights import EMBEDDING_LAYER

ORIGIN = "bigscience"
_POSITIONS = {2: "learned", 3: "alibi", "absolute": "learned", "alibi": "alibi"}
# Arguments under which that trainer computes something that megalm's blocks do not: (name, value that is fine).
_ONLY = {
    "apply_residual_connection_post_layernorm": (False, None),
    "glu_activation": (None,),
    "openai_gelu": (False, None),
    "onnx_safe": (False, None),
}


def is_bigscience(folder: Path) -> bool:
    """Whether a folder is such a checkpoint. One of megalm's that has lost its manifest is not: it has other files."""
    return (
        not (folder / layout.MANIFEST).exists()
        and not (folder / layout.TRAIN_STATE).exists()
        and (folder / layout.layer_file(EMBEDDING_LAYER, 0)).is_file()
        and (folder / layout.model_file(0)).is_file()
    )


class BigScienceCheckpoint:
    """What the pickled arguments of a checkpoint say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / layout.model_file(0)
        state = read_with_stand_ins(path, mmap=True)
        arguments = state.get("args") if isinstance(state, dict) else None
        if not isinstance(arguments, InertObject):
            raise CheckpointError(f"{path} holds no training arguments")
        self._path = path
        self._state: dict[str, Any] = state
        self._arguments = vars(arguments)

    def manifest(self, *, tp_size: int | None = None) -> Manifest:
        """The checkpoint described as one of megalm's, without hashes: there is nothing to verify it by.

        `tp_size` is the number of shards; that of the layer files when not given.

        Raises: CheckpointError if the model is one that megalm cannot build.
        """
        model = self._model()
        tp_size = tensor_parallel_size(self.folder) if tp_size is None else tp_size
        sizes = {"tp": tp_size, "pp": self._arguments.get("pipeline_model_parallel_size", 1), "dp": 0, "zero_stage": 1}
        dtype = "bf16" if self._arguments.get("bf16") else "fp16" if self._arguments.get("fp16") else "fp32"
        return Manifest(
            step=self._count("iteration"),
            layout={**sizes, "dtype": dtype, "origin": ORIGIN, "qkv_version": self._version()},
            model=resolved_fields(model, seq_length=self._arguments.get("seq_length")),
            versions={},
        )

    def train_state(self) -> dict[str, int]:
        """Progress, in the terms of train_state.json."""
        samples = self._count("consumed_train_samples")
        tokens = self._count("consumed_train_tokens") or samples * self._count("seq_length")
        return {
            "step": self._count("iteration"),
            "consumed_samples": samples,
            "consumed_tokens": tokens,
            "skipped_steps": 0,
        }

    def _count(self, name: str) -> int:
        value = self._state.get(name, self._arguments.get(name, 0))
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0

    def _version(self) -> float:
        version = self._state.get("checkpoint_version", 0)
        if version not in (0, 1.0, 2.0, 3.0):
            raise CheckpointError(f"{self._path}: checkpoint_version = {version!r} must be 0, 1.0, 2.0 or 3.0")
        return float(version)

    def _model(self) -> ModelConfig:
        given = self._arguments
        for name, fine in _ONLY.items():
            if given.get(name) not in fine:
                raise CheckpointError(f"{self._path}: {name} = {given[name]!r}, which megalm's blocks do not compute")
        try:
            model = ModelConfig(
                num_layers=given["num_layers"],
                hidden_size=given["hidden_size"],
                num_heads=given["num_attention_heads"],
                ffn_hidden_size=given.get("ffn_hidden_size"),
                position_embedding=self._position_embedding(),
                max_position_embeddings=given.get("max_position_embeddings"),
                embed_layernorm=bool(given.get("embed_layernorm", False)),
                activation="gelu_tanh" if given.get("bias_gelu_fusion", True) else "gelu_erf",
                layernorm_epsilon=float(given.get("layernorm_epsilon", 1e-5)),
                hidden_dropout=float(given.get("hidden_dropout", 0.0)),
                attention_dropout=float(given.get("attention_dropout", 0.0)),
                init_std=float(given.get("init_method_std", 0.02)),
                vocab_size=None,
                pad_vocab_size_to=given["padded_vocab_size"],
            )
            check_sizes(model)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._path} describes no model that megalm can build: {error}") from error
        return model

    def _position_embedding(self) -> str:
        value = self._arguments.get("position_embedding_type", "absolute")
        if isinstance(value, InertObject):  # an enumeration, pickled as a call with its value
            value = value.arguments[0] if value.arguments else None
        if value not in _POSITIONS:
            raise ValueError(f"position_embedding_type = {value!r} is neither absolute nor ALiBi")
        return _POSITIONS[value]

"""A checkpoint as something to read from: megalm's own, one of BigScience's, or DeepSpeed's universal form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.checkpoint import layout
from megalm.checkpoint.bigscience import BigScienceCheckpoint, is_bigscience
from megalm.checkpoint.fused_qkv import CURRENT
from megalm.checkpoint.identity import stored_model
from megalm.checkpoint.inert import read_with_stand_ins
from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.checkpoint.merge import LayerFiles
from megalm.checkpoint.optimizer_files import OptimizerFiles, Reader
from megalm.checkpoint.tensor_files import read_tensors
from megalm.checkpoint.universal import UniversalLayers, UniversalOptimizer, is_universal, read_universal_manifest
from megalm.errors import CheckpointError
from megalm.models.gpt.shape import GPTShape, gpt_shape


@dataclass(frozen=True)
class Source:
    """One checkpoint's folder, its description, and its files."""

    folder: Path
    manifest: Manifest
    shape: GPTShape
    layers: LayerFiles
    read: Reader
    """How its torch files are read."""
    train_state: dict[str, Any]
    """Progress of the run that wrote it."""

    def optimizer(self) -> OptimizerFiles:
        """Its optimizer states."""
        if isinstance(self.layers, UniversalLayers):
            return UniversalOptimizer(self.layers)
        return OptimizerFiles(self.layers, read=self.read)

    @property
    def dtype(self) -> str | None:
        """fp32, bf16 or fp16: what the run computed in, as far as is known."""
        found = self.manifest.layout.get("dtype")
        return found if isinstance(found, str) else None


def open_checkpoint(folder: Path) -> Source:
    """Open a checkpoint of any kind; of its files only the descriptions are read.

    Raises: CheckpointError if it is none, or incomplete.
    """
    if is_universal(folder):
        manifest, progress = read_universal_manifest(folder)
        shape = gpt_shape(stored_model(manifest, path=folder))
        state = read_train_state(folder) if progress is None else progress
        return Source(folder, manifest, shape, _universal_layers(folder, shape, manifest), read_with_stand_ins, state)
    if is_bigscience(folder):
        foreign = BigScienceCheckpoint(folder)
        manifest, read, state = foreign.manifest(), read_with_stand_ins, foreign.train_state()
        version = float(manifest.layout["qkv_version"])
        shape = gpt_shape(stored_model(manifest, path=folder))
        layers = LayerFiles(folder, shape, qkv_version=version)
        return Source(folder, manifest, shape, layers, read, state)
    manifest = read_manifest(folder)
    shape = gpt_shape(stored_model(manifest, path=folder))
    layers = LayerFiles(folder, shape, qkv_version=CURRENT)
    return Source(folder, manifest, shape, layers, read_tensors, read_train_state(folder))


def _universal_layers(folder: Path, shape: GPTShape, manifest: Manifest) -> UniversalLayers:
    return UniversalLayers(folder, shape, dtype=manifest.layout.get("dtype"))


def read_train_state(folder: Path) -> dict[str, Any]:
    """The content of train_state.json.

    Raises: CheckpointError if it cannot be read or is no JSON object.
    """
    file = folder / layout.TRAIN_STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return state

"""Whole weights out of a checkpoint's shards, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint import layout
from megalm.checkpoint.fused_qkv import CURRENT, in_current_order
from megalm.checkpoint.tensor_files import read_tensors
from megalm.errors import CheckpointError
from megalm.models.gpt.shape import GPTShape
from megalm.models.gpt.weights import Weight, weight_table


@dataclass
class LayerFiles:
    """The layer files of one checkpoint, whatever tensor-parallel size wrote them."""

    folder: Path
    shape: GPTShape
    qkv_version: float = CURRENT
    drift: dict[str, float] = field(default_factory=dict)
    """Replicated weights whose copies differ, with the largest difference of an element from their mean."""

    def __post_init__(self) -> None:
        self.tp_size = tensor_parallel_size(self.folder)

    def read_layer(self, index: int) -> list[dict[str, Any]]:
        """The contents of one layer's files, by tensor rank; tensors are read when they are touched."""
        return [_state_dict(self.folder / layout.layer_file(index, rank)) for rank in range(self.tp_size)]

    def iterate(self) -> Iterator[tuple[Weight, Tensor]]:
        """Every weight, whole, in the order of the layers.

        Raises: CheckpointError if a weight is missing or has another shape.
        """
        index, shards = -1, []
        for weight in weight_table(self.shape):
            if weight.layer != index:
                index, shards = weight.layer, self.read_layer(weight.layer)
            yield weight, self.merge(weight, shards)

    def merge(self, weight: Weight, shards: list[dict[str, Any]]) -> Tensor:
        """One weight out of its layer's shards: concatenated, or the mean of copies that should be equal."""
        parts = [self.part(weight, state, rank) for rank, state in enumerate(shards)]
        if weight.partition_dim is not None:
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=weight.partition_dim)
        if all(torch.equal(parts[0], part) for part in parts[1:]):
            return parts[0]
        exact = torch.stack([part.double() for part in parts])
        mean = exact.mean(dim=0)
        self.drift[weight.name] = (exact - mean).abs().max().item()
        return mean.to(parts[0].dtype)

    def file_of(self, weight: Weight, rank: int) -> Path:
        """Where one tensor rank's part of a weight lies."""
        return self.folder / layout.layer_file(weight.layer, rank)

    def part(self, weight: Weight, state: dict[str, Any], rank: int) -> Tensor:
        """One tensor rank's part of a weight.

        Raises: CheckpointError if it is missing, or of another shape.
        """
        file = self.file_of(weight, rank)
        part = state.get(weight.key)
        if not isinstance(part, Tensor):
            raise CheckpointError(
                f"{file} has no tensor {weight.key!r}; it has {', '.join(map(str, state)) or 'nothing'}"
            )
        expected = list(weight.shard_shape(self.tp_size))
        if not part.is_floating_point():
            raise CheckpointError(f"{file}: {weight.key} holds {part.dtype}, and weights are floating-point")
        if list(part.shape) != expected:
            raise CheckpointError(
                f"{file}: {weight.key} has shape {list(part.shape)}, and the model's is {expected}\n"
                "  the shard is from another model or another tensor-parallel size"
            )
        return in_current_order(weight, part, version=self.qkv_version, head_size=self.shape.block.head_size)


def tensor_parallel_size(folder: Path) -> int:
    """How many shards each layer has.

    Raises: CheckpointError if there are no layer files, or not the same number for each layer.
    """
    ranks: dict[int, set[int]] = {}
    for path in folder.iterdir():
        parsed = layout.parse_layer_file(path.name)
        if parsed is not None:
            ranks.setdefault(parsed[0], set()).add(parsed[1])
    if not ranks:
        raise CheckpointError(f"{folder} has no layer files (layer_XX-model_YY-model_states.pt)")
    size = max(len(found) for found in ranks.values())
    for index, found in sorted(ranks.items()):
        if found != set(range(size)):
            raise CheckpointError(
                f"{folder}: layer {index} has shards {sorted(found)}, and others have 0 to {size - 1}"
            )
    return size


def _state_dict(path: Path) -> dict[str, Any]:
    state = read_tensors(path, mmap=True)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no state dict")
    return state

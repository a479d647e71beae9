"""Optimizer states out of a checkpoint, by weight, whatever the layout and ZeRO stage that wrote it.

DeepSpeed's own loaders demand the layout they saved with. What its files hold is enough for any: per rank, flat
partitions of the fp32 weights and of Adam's moments, and which weight lies where in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalm.checkpoint import layout
from megalm.checkpoint.fused_qkv import in_current_order
from megalm.checkpoint.merge import LayerFiles
from megalm.checkpoint.tensor_files import InertState, read_tensors
from megalm.errors import CheckpointError
from megalm.models.gpt.shape import GPTShape
from megalm.models.gpt.weights import EMBEDDING_LAYER, TIED_KEY, Weight, weight_table

MASTER = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
Reader = Callable[..., Any]
"""`read_tensors`, or `read_with_stand_ins` for files of other programs."""
PARAMETER_GROUPS = "megalm_parameter_groups"
"""Key in the engine-state files: names of the weights of each optimizer group (ZeRO-0) or sub-group (ZeRO-3)."""


@dataclass(frozen=True)
class Pieces:
    """A flat tensor that lies in several files, in order."""

    parts: tuple[Tensor, ...]

    def range(self, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop`; parts outside are not touched."""
        found = []
        offset = 0
        for part in self.parts:
            low, high = max(start, offset), min(stop, offset + part.numel())
            if low < high:
                found.append(part[low - offset : high - offset])
            offset += part.numel()
        if sum(part.numel() for part in found) != stop - start:
            raise CheckpointError(f"optimizer partitions hold {offset} elements of a weight, {stop} are needed")
        return found[0] if len(found) == 1 else torch.cat(found)


class LocalState(NamedTuple):
    """The optimizer state of one weight on one (stage, tensor rank): by key, flat."""

    pieces: Mapping[str, Pieces]
    step: float


StateReader = Callable[[], LocalState]


class OptimizerFiles:
    """The optimizer states of one checkpoint. Tensors are read when they are touched."""

    def __init__(self, layers: LayerFiles, *, read: Reader = read_tensors) -> None:
        folder, shape, tp_size = layers.folder, layers.shape, layers.tp_size
        self._layers = layers
        self._read = read
        self._folder = folder
        self._tp_size = tp_size
        self._names = _local_names(shape)
        self._last_layer = max(weight.layer for weight in self._names.values())
        self._model_ranks = sorted(
            {rank for path in folder.iterdir() if (rank := layout.parse_model_file(path.name)) is not None}
        )
        self._partitions: dict[int, dict[int, Path]] = {}
        for path in folder.iterdir():
            parsed = layout.parse_optimizer_file(path.name)
            if parsed is not None:
                self._partitions.setdefault(parsed[1], {})[parsed[0]] = path

    @cached_property
    def exists(self) -> bool:
        """Whether there is any optimizer state."""
        return bool(self._partitions) or any(
            self._engine_state(rank).get("optimizer") is not None for rank in self._model_ranks[:1]
        )

    def state(self, weight: Weight, tp_rank: int) -> LocalState:
        """The state of one weight on one tensor rank.

        Raises: CheckpointError if there is none.
        """
        for stage in self._likely_stages(weight):
            mp_rank = layout.model_rank(pp_rank=stage, tp_rank=tp_rank, tp_size=self._tp_size)
            found = self._of_rank(mp_rank).get(weight.name)
            if found is not None:
                return found()
        raise CheckpointError(f"{self._folder} has no optimizer state of {weight.name} for tensor rank {tp_rank}")

    def _likely_stages(self, weight: Weight) -> list[int]:
        """Stages in the order in which to look for a weight. Each costs opening the files of all its replicas, and
        thousands of ranks look at once. What the first and the last stage both hold is found in the first."""
        num_stages = max([*self._model_ranks, *self._partitions]) // self._tp_size + 1
        likely = weight.layer * num_stages // (self._last_layer + 1)
        return sorted(range(num_stages), key=lambda stage: abs(stage - likely))

    def state_of_copies(self, weight: Weight) -> LocalState:
        """The state of a weight that all tensor ranks hold alike; the mean, where their copies were found to differ."""
        first = self.state(weight, 0)
        if weight.name not in self._layers.drift:
            return first
        others = [self.state(weight, rank) for rank in range(1, self._tp_size)]
        means = {}
        for key, pieces in first.pieces.items():
            copies = torch.stack([one.range(0, weight.numel) for one in (pieces, *(o.pieces[key] for o in others))])
            means[key] = Pieces((copies.double().mean(dim=0).to(copies.dtype),))
        return LocalState(means, first.step)

    def whole(self, weight: Weight, key: str) -> Tensor:
        """One of a weight's states, whole: shards of all tensor ranks concatenated."""
        if weight.partition_dim is None:
            return self.state_of_copies(weight).pieces[key].range(0, weight.numel).view(weight.shape)
        shape = weight.shard_shape(self._tp_size)
        count = weight.numel // self._tp_size
        version, head_size = self._layers.qkv_version, self._layers.shape.block.head_size
        parts = []
        for rank in range(self._tp_size):
            part = self.state(weight, rank).pieces[key].range(0, count).view(shape)
            parts.append(in_current_order(weight, part, version=version, head_size=head_size))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=weight.partition_dim)

    def rows(self, weight: Weight, key: str, rows: range) -> Tensor:
        """Some rows of one of a weight's states, of the parts that tensor ranks have; no other bytes are touched.

        Rows of query_key_value as they are now must be the stored ones: see `in_current_order`.
        """
        assert weight.partition_dim is not None
        shape = weight.shard_shape(self._tp_size)
        width = math.prod(shape[1:])
        found = []
        for rank in range(self._tp_size):
            first = rank * shape[0] if weight.partition_dim == 0 else 0
            low, high = max(rows.start - first, 0), min(rows.stop - first, shape[0])
            if low < high:
                part = self.state(weight, rank).pieces[key].range(low * width, high * width)
                found.append(part.view(high - low, *shape[1:]))
        return found[0] if len(found) == 1 else torch.cat(found, dim=weight.partition_dim)

    def loss_scaler(self) -> dict[str, Any] | None:
        """Attributes of the fp16 loss scaler, if one was saved."""
        for rank in sorted(self._partitions)[:1]:
            scaler = self._partition(rank, 0).get("loss_scaler")
            if isinstance(scaler, InertState):
                return dict(vars(scaler))
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What each group of parameters is optimised with (lr, betas, ...), without those; empty if unknown."""
        if self._partitions:
            state = self._partition(min(self._partitions), 0)
            base = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
        else:
            base = self._engine_state(self._model_ranks[0]).get("optimizer") if self._model_ranks else None
        groups = base.get("param_groups") if isinstance(base, dict) else None
        return [{key: value for key, value in group.items() if key != "params"} for group in groups or []]

    def _of_rank(self, mp_rank: int) -> Mapping[str, StateReader]:
        """By canonical name, how to read each weight's state on one (stage, tensor rank)."""
        if mp_rank not in self._readers:
            self._readers[mp_rank] = dict(self._read_rank(mp_rank))
        return self._readers[mp_rank]

    @cached_property
    def _readers(self) -> dict[int, dict[str, StateReader]]:
        return {}

    def _read_rank(self, mp_rank: int) -> Iterator[tuple[str, StateReader]]:
        partitions = self._partitions.get(mp_rank)
        if partitions is None:
            yield from _from_plain(self._engine_state(mp_rank), self._folder)
            return
        if sorted(partitions) != list(range(len(partitions))):
            raise CheckpointError(
                f"{self._folder}: mp_rank {mp_rank} has optimizer partitions {sorted(partitions)} only"
            )
        states = [self._partition(mp_rank, rank) for rank in range(len(partitions))]
        if "fp32_flat_groups" in states[0]:
            groups = _names_of_groups(self._sharded_engine_state(mp_rank), self._folder)
            shares = {name: -(-self._local_numel(name) // len(states)) for names in groups for name in names}
            yield from _from_sharded(states, groups, shares)
        else:
            for local, read in _from_flat(states):
                yield self._weight(local).name, read

    def _partition(self, mp_rank: int, dp_rank: int) -> dict[str, Any]:
        path = self._partitions[mp_rank][dp_rank]
        content = self._read(path, mmap=True)
        state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
        if not isinstance(state, dict):
            raise CheckpointError(f"{path} holds no optimizer state")
        return state

    def _engine_state(self, mp_rank: int) -> dict[str, Any]:
        return read_engine_state(self._folder / layout.model_file(mp_rank), read=self._read)

    def _sharded_engine_state(self, mp_rank: int) -> dict[str, Any]:
        return read_engine_state(self._folder / layout.sharded_model_file(dp_rank=0, mp_rank=mp_rank), read=self._read)

    def _weight(self, local: str) -> Weight:
        if local not in self._names:
            raise CheckpointError(f"{self._folder} has optimizer state of {local!r}, which this model does not have")
        return self._names[local]

    def _local_numel(self, local: str) -> int:
        weight = self._weight(local)
        return weight.numel if weight.partition_dim is None else weight.numel // self._tp_size


def read_engine_state(path: Path, *, read: Reader = read_tensors) -> dict[str, Any]:
    """The content of an engine-state file, or nothing if it is not there.

    Raises: CheckpointError.
    """
    if not path.is_file():
        return {}
    state = read(path, mmap=True)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no engine state")
    return state


def _local_names(shape: GPTShape) -> dict[str, Weight]:
    """Weights by every name that a stage or a single-stage model has for them."""
    names = {}
    for weight in weight_table(shape):
        names[weight.name] = weight
        names[f"{weight.layer}.{weight.key}"] = weight
        if weight.layer == EMBEDDING_LAYER:
            names[f"tied_modules.{TIED_KEY}.{weight.key}"] = weight
            names[f"embedding.{weight.key}"] = weight
    return names


def _names_of_groups(state: Mapping[str, Any], folder: Path) -> list[list[str]]:
    groups = state.get(PARAMETER_GROUPS)
    if not isinstance(groups, list):
        raise CheckpointError(f"{folder} does not say which weights its optimizer groups hold")
    return groups


def _from_plain(state: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, StateReader]]:
    """ZeRO-0: torch's state dict, a state a parameter; the weights themselves are fp32."""
    optimizer = state.get("optimizer")
    if not isinstance(optimizer, dict):
        return
    groups = _names_of_groups(state, folder)
    for names, group in zip(groups, optimizer["param_groups"], strict=True):
        for name, index in zip(names, group["params"], strict=True):
            own = optimizer["state"].get(index)
            if own is None:  # before the first update
                yield name, partial(LocalState, {}, 0.0)
                continue
            pieces = {key: Pieces((own[key].flatten(),)) for key in MOMENTS}
            yield name, partial(LocalState, pieces, float(own["step"]))


def _from_flat(states: list[dict[str, Any]]) -> Iterator[tuple[str, StateReader]]:
    """ZeRO-1, ZeRO-2 and BF16_Optimizer: each rank a range of every group's concatenated weights."""
    where: dict[str, list[tuple[int, int, int, int]]] = {}
    for dp_rank, state in enumerate(states):
        for group, addresses in enumerate(state["param_slice_mappings"]):
            for name, address in addresses.items():
                where.setdefault(name, []).append((dp_rank, group, address.start, address.numel))

    def read(fragments: list[tuple[int, int, int, int]]) -> LocalState:
        parts: dict[str, list[Tensor]] = {key: [] for key in (MASTER, *MOMENTS)}
        step = 0.0
        for dp_rank, group, start, count in fragments:
            state = states[dp_rank]
            parts[MASTER].append(state["single_partition_of_fp32_groups"][group].detach()[start : start + count])
            moments = _group_state(state["base_optimizer_state"], group)
            if moments is not None:
                step = float(moments["step"])
                for key in MOMENTS:
                    parts[key].append(moments[key][start : start + count])
        return LocalState({key: Pieces(tuple(found)) for key, found in parts.items() if found}, step)

    for name, fragments in where.items():
        yield name, partial(read, fragments)


def _group_state(base: Any, group: int) -> Mapping[str, Any] | None:
    """The moments of one flat group: torch's state dict, or DeepSpeed's elastic list; None before the first update."""
    if isinstance(base, list):
        return base[group] or None
    index = base["param_groups"][group]["params"][0]
    state = base["state"].get(index)
    if state is not None and "step" not in state:
        state = {**state, "step": base["param_groups"][group].get("step", 0)}
    return state


def _from_sharded(
    states: list[dict[str, Any]], groups: list[list[str]], shares: Mapping[str, int]
) -> Iterator[tuple[str, StateReader]]:
    """ZeRO-3: each rank an equal share of every weight, padded at the end of the last one."""

    def read(group: int, offset: int, share: int) -> LocalState:
        parts: dict[str, list[Tensor]] = {key: [] for key in (MASTER, *MOMENTS)}
        step = 0.0
        for state in states:
            parts[MASTER].append(state["fp32_flat_groups"][group].detach()[offset : offset + share])
            moments = state["optimizer_state_dict"]["state"].get(group)
            if moments is not None:
                step = float(moments["step"])
                for key in MOMENTS:
                    parts[key].append(moments[key][offset : offset + share])
        return LocalState({key: Pieces(tuple(found)) for key, found in parts.items() if found}, step)

    for group, names in enumerate(groups):
        offset = 0
        for name in names:
            share = shares[name]
            yield name, partial(read, group, offset, share)
            offset += share

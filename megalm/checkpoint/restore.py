"""A checkpoint of any layout into a running engine of any layout, one weight at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megalm.checkpoint.engine_optimizer import OptimizerState, ShardedState, optimizer_state_of
from megalm.checkpoint.fused_qkv import CURRENT
from megalm.checkpoint.merge import LayerFiles
from megalm.checkpoint.optimizer_files import MASTER, MOMENTS, OptimizerFiles
from megalm.checkpoint.split import shard
from megalm.errors import CheckpointError
from megalm.models.gpt.shape import GPTShape
from megalm.models.gpt.weights import Weight, initial_rule, named_in_model, named_in_pipeline, weight_table
from megalm.parallel.initialise import Constant, drawn_rows
from megalm.topology.group import Group

SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Attributes of DeepSpeed's adaptive loss scaler that training moves; the others say how."""


def named_parameters(module: nn.Module) -> Iterator[tuple[Weight, nn.Parameter]]:
    """This rank's parameters with the weights that they are parts of; `module` is a GPT or a GPTPipeline."""
    shape: GPTShape = module.plan.shape  # type: ignore[assignment]
    weights = {weight.name: weight for weight in weight_table(shape)}
    named = named_in_pipeline if hasattr(module, "forward_funcs") else named_in_model
    for name, parameter in named(module, shape):
        yield weights[name], parameter


class Restorer:
    """Copies what a checkpoint holds into an engine. Does not communicate.

    Beside its own share a rank holds one whole weight at a time; at an unchanged tensor-parallel size it touches only
    the bytes that it keeps.
    """

    def __init__(
        self, engine: Any, layers: LayerFiles, optimizer: OptimizerFiles | None, *, tp: Group, seed: int
    ) -> None:
        self._engine = engine
        self._seed = seed
        self._tp = tp
        self._layers = layers
        self._source = {weight.name: weight for weight in weight_table(layers.shape)}
        self._files = optimizer if optimizer is not None and optimizer.exists else None
        self._layer: tuple[int, list[dict[str, Any]]] = (-1, [])

    @torch.no_grad()
    def restore(self) -> None:
        """Set weights, fp32 masters and, where they are loaded, Adam's moments."""
        state = optimizer_state_of(self._engine.optimizer)
        if self._files is not None:
            state.prepare()
        for weight, parameter in named_parameters(self._engine.module):
            self._restore_one(weight, parameter, state)
        state.finish()
        if self._files is not None:
            self._restore_loss_scaler(self._files)

    def _restore_one(self, weight: Weight, parameter: nn.Parameter, state: OptimizerState) -> None:
        stored = self._source.get(weight.name)
        if stored is None:
            raise CheckpointError(f"the checkpoint has no {weight.name}")
        value = self._value(stored, weight, parameter)
        if not isinstance(state, ShardedState):
            parameter.copy_(value.view(weight.shard_shape(self._tp.size)))
        owned = state.owned(parameter)
        if owned is None:
            return
        flat = value.reshape(-1)
        if self._files is None:
            state.put(parameter, MASTER, flat[owned[0] : owned[1]])
            return
        if stored.partition_dim is None:
            pieces, step = self._files.state_of_copies(stored)
        else:
            pieces, step = self._files.state(stored, self._source_rank)
        same = self._same_shards(stored, weight) and self._layers.qkv_version >= CURRENT
        for key in (MASTER, *MOMENTS):
            if key not in pieces:
                part = flat[owned[0] : owned[1]] if key == MASTER else None
            elif same:
                part = pieces[key].range(*owned)
            elif stored.shape == weight.shape and self._layers.qkv_version >= CURRENT:
                part = self._owned_of_others_shards(self._files, weight, key, range(*owned))
            else:
                whole = self._fitted(self._files.whole(stored, key), stored, weight, parameter, key)
                part = shard(weight, whole, tp_rank=self._tp.rank, tp_size=self._tp.size).reshape(-1)[slice(*owned)]
            if part is not None:
                state.put(parameter, key, part)
        state.put_step(parameter, step)

    def _owned_of_others_shards(self, files: OptimizerFiles, weight: Weight, key: str, owned: range) -> Tensor:
        """What this rank keeps of a weight that is cut over another number of tensor ranks: of a stage's states, whose
        hundreds of gigabytes each of its ranks would otherwise read, the rows that it lies in."""
        shape = weight.shard_shape(self._tp.size)
        width = math.prod(shape[1:])
        rows = range(owned.start // width, -(-owned.stop // width))
        first = self._tp.rank * shape[0] if weight.partition_dim == 0 else 0
        found = files.rows(weight, key, range(first + rows.start, first + rows.stop))
        if weight.partition_dim == 1:
            found = found.narrow(1, self._tp.rank * shape[1], shape[1])
        start = rows.start * width
        return found.reshape(-1)[owned.start - start : owned.stop - start]

    @property
    def _source_rank(self) -> int:
        """The tensor rank whose shards this rank reads, where shards are the same."""
        return self._tp.rank if self._tp.size == self._layers.tp_size else 0

    def _same_shards(self, stored: Weight, weight: Weight) -> bool:
        same_size = stored.partition_dim is None or self._tp.size == self._layers.tp_size
        return same_size and stored.shape == weight.shape

    def _value(self, stored: Weight, weight: Weight, parameter: nn.Parameter) -> Tensor:
        """This rank's part of the weight in the best precision that the checkpoint has."""
        index, shards = self._layer
        if index != stored.layer:
            shards = self._layers.read_layer(stored.layer)
            self._layer = (stored.layer, shards)
        own = self._same_shards(stored, weight) and stored.partition_dim is not None
        if own:
            value = self._layers.part(stored, shards[self._tp.rank], self._tp.rank)
        else:
            value = self._layers.merge(stored, shards)
        wider = value.dtype != torch.float32 and parameter.dtype != value.dtype
        if wider and self._files is not None and MASTER in self._files.state(stored, 0).pieces:
            own, value = False, self._files.whole(stored, MASTER)
        if own:
            return value
        whole = self._fitted(value, stored, weight, parameter, MASTER)
        return shard(weight, whole, tp_rank=self._tp.rank, tp_size=self._tp.size)

    def _fitted(self, whole: Tensor, stored: Weight, weight: Weight, parameter: nn.Parameter, key: str) -> Tensor:
        """A whole tensor with the rows of this run's vocabulary padding: fewer, or more.

        Added rows of the weight are those that a fresh run of this seed and padding starts with, the same in the weight
        and its fp32 master; their moments are zero.
        """
        if stored.shape == weight.shape:
            return whole
        rows = weight.shape[0]
        if stored.shape[1:] != weight.shape[1:] or weight.partition_dim != 0:
            raise CheckpointError(
                f"{weight.name} is {list(stored.shape)} in the checkpoint and {list(weight.shape)} here"
            )
        if rows <= whole.size(0):
            return whole[:rows]
        if key != MASTER:
            return torch.cat([whole, whole.new_zeros(rows - whole.size(0), *whole.shape[1:])])
        drawn = self._drawn(weight, range(whole.size(0), rows)).to(parameter.dtype)
        return torch.cat([whole.float(), drawn.float()])

    def _drawn(self, weight: Weight, rows: range) -> Tensor:
        """Initial values of some rows of a weight, fp32."""
        rule = initial_rule(self._engine.module.plan.shape, weight.name)
        if isinstance(rule, Constant):
            return torch.full((len(rows), *weight.shape[1:]), rule.value)
        total = (weight.shape[0], weight.numel // weight.shape[0])
        blocks = drawn_rows(weight.name, rows, total=total, seed=self._seed, std=rule.std)
        return torch.cat([block for _, block in blocks]).view(len(rows), *weight.shape[1:])

    def _restore_loss_scaler(self, files: OptimizerFiles) -> None:
        """Go on with an adaptive scale of fp16's loss; a fixed one, and the bounds of the other, are this run's own."""
        stored = files.loss_scaler() or {}
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if scaler is None or any(name not in known for name in SCALE for known in (stored, vars(scaler))):
            return
        vars(scaler).update({name: stored[name] for name in SCALE})
        scaler.cur_scale = max(scaler.cur_scale, scaler.min_scale)
        scaler.cur_hysteresis = min(scaler.cur_hysteresis, scaler.delayed_shift)

"""Optimizer states into a running DeepSpeed engine, weight by weight.

Each class knows where one of DeepSpeed 0.19's optimizers keeps the fp32 weights and Adam's moments. The names of its
attributes are what this file depends on; tests/dist/test_checkpoint.py resumes through every one of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from megalm.checkpoint.optimizer_files import MASTER, MOMENTS
from megalm.errors import CheckpointError


class OptimizerState(ABC):
    """Where the state of this rank's parameters lies."""

    def __init__(self, optimizer: Any, base: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._base = base

    @abstractmethod
    def owned(self, parameter: nn.Parameter) -> tuple[int, int] | None:
        """The range of the flat parameter whose state this rank keeps; None if it keeps nothing of it."""

    @abstractmethod
    def put(self, parameter: nn.Parameter, key: str, values: Tensor) -> None:
        """Set the owned range of the fp32 weight or of a moment."""

    @abstractmethod
    def put_step(self, parameter: nn.Parameter, step: float) -> None:
        """Set the number of updates that the moments have seen."""

    @abstractmethod
    def flat_tensors(self) -> list[Tensor]:
        """The tensors that torch's optimizer updates."""

    def prepare(self) -> None:
        """Give every tensor moments of zero, as before the first update."""
        for tensor, fused in self._with_fused():
            device = tensor.device if fused else torch.device("cpu")
            self._base.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                **{key: torch.zeros_like(tensor.detach(), memory_format=torch.preserve_format) for key in MOMENTS},
            }

    def finish(self) -> None:  # noqa: B027  (most need nothing)
        """Let DeepSpeed find the new states."""

    def _with_fused(self) -> list[tuple[Tensor, bool]]:
        """Each tensor, and whether its step count lies on the device: fused Adam reads it there."""
        fused = any(group.get("fused") or group.get("capturable") for group in self._base.param_groups)
        return [(tensor, fused) for tensor in self.flat_tensors()]


class PlainState(OptimizerState):
    """torch's optimizer over the parameters themselves: fp32 without ZeRO."""

    def owned(self, parameter: nn.Parameter) -> tuple[int, int] | None:
        return 0, parameter.numel()

    def put(self, parameter: nn.Parameter, key: str, values: Tensor) -> None:
        target = parameter.detach() if key == MASTER else self._base.state[parameter][key]
        target.view(-1).copy_(values)

    def put_step(self, parameter: nn.Parameter, step: float) -> None:
        self._base.state[parameter]["step"].fill_(step)

    def flat_tensors(self) -> list[Tensor]:
        return [parameter for group in self._base.param_groups for parameter in group["params"]]


class FlatState(OptimizerState):
    """ZeRO-1, ZeRO-2 and BF16_Optimizer: a range of each group's concatenated parameters."""

    def __init__(self, optimizer: Any, base: torch.optim.Optimizer, partitions: list[Tensor]) -> None:
        super().__init__(optimizer, base)
        self._partitions = partitions

    def owned(self, parameter: nn.Parameter) -> tuple[int, int] | None:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        address = mapping.lp_fragment_address
        return address.start, address.start + address.numel

    def put(self, parameter: nn.Parameter, key: str, values: Tensor) -> None:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        partition = self._partitions[mapping.param_group_index]
        target = partition.detach() if key == MASTER else self._base.state[partition][key]
        address = mapping.hp_fragment_address
        target.narrow(0, address.start, address.numel).copy_(values)

    def put_step(self, parameter: nn.Parameter, step: float) -> None:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        self._base.state[self._partitions[mapping.param_group_index]]["step"].fill_(step)

    def flat_tensors(self) -> list[Tensor]:
        return list(self._partitions)

    def finish(self) -> None:
        # Fragments of moments are views that DeepSpeed takes at the next update.
        self._optimizer._hp_optimizer_states_linked = False


class ShardedState(OptimizerState):
    """ZeRO-3: an equal share of every parameter, the weights themselves included."""

    def owned(self, parameter: nn.Parameter) -> tuple[int, int] | None:
        _, _, share = self._position(parameter)
        start = self._optimizer._get_param_partition_rank(parameter) * share
        stop = min(start + share, parameter.ds_numel)  # type: ignore[attr-defined]
        return (start, stop) if start < stop else None

    def put(self, parameter: nn.Parameter, key: str, values: Tensor) -> None:
        group, offset, _ = self._position(parameter)
        partition = self._optimizer.fp32_partitioned_groups_flat[group]
        target = partition.detach() if key == MASTER else self._base.state[partition][key]
        target.narrow(0, offset, values.numel()).copy_(values)

    def put_step(self, parameter: nn.Parameter, step: float) -> None:
        group, _, _ = self._position(parameter)
        self._base.state[self._optimizer.fp32_partitioned_groups_flat[group]]["step"].fill_(step)

    def flat_tensors(self) -> list[Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def finish(self) -> None:
        """Round the fp32 shares into the parameters, as an update ends."""
        optimizer = self._optimizer
        pairs = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
        for group, (rounded, exact) in enumerate(pairs):
            rounded.data.copy_(exact.data)
            shares = optimizer.fp16_partitioned_groups[group]
            for share, updated in zip(shares, optimizer.unflatten(rounded, shares), strict=True):
                share.data = updated.data
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)

    def _position(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        """(sub-group, offset in it, elements of the share)."""
        group, offset, count = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        return int(group), int(offset), int(count)


def optimizer_state_of(optimizer: Any) -> OptimizerState:
    """The state of a DeepSpeed engine's `optimizer`.

    Raises: CheckpointError for an optimizer that this version of megalm does not know.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return ShardedState(optimizer, optimizer.optimizer)
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return FlatState(optimizer, optimizer.optimizer, optimizer.fp32_groups_flat_partition)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return FlatState(optimizer, optimizer.optimizer, optimizer.single_partition_of_fp32_groups)
    if isinstance(optimizer, torch.optim.Optimizer):
        return PlainState(optimizer, optimizer)
    raise CheckpointError(
        f"megalm cannot load into {type(optimizer).__name__}\n  use one of ZeRO's stages, or fp32 without"
    )

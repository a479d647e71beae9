"""Which part of a tensor one rank of a group holds."""

from __future__ import annotations

from torch import nn

from megalm.errors import ConfigError
from megalm.topology.group import Group


def shard_size(total: int, group: Group, *, what: str) -> int:
    """Elements of `total` that each rank of `group` holds.

    Raises: ConfigError if the group's size does not divide `total`.
    """
    if total % group.size != 0:
        divisors = [size for size in range(1, min(total, 1024) + 1) if total % size == 0]
        raise ConfigError(
            f"{what} = {total} must be divisible by the tensor-parallel size {group.size}\n"
            f"  sizes that fit: {', '.join(map(str, divisors))}"
        )
    return total // group.size


def mark_sharded(parameter: nn.Parameter, *, dim: int) -> nn.Parameter:
    """Record that `parameter` is one rank's part of a weight that is cut along `dim`.

    DeepSpeed reads `tensor_model_parallel` when it sums gradient norms over ranks.
    """
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = dim  # type: ignore[attr-defined]
    return parameter


def mark_replicated(parameter: nn.Parameter) -> nn.Parameter:
    """Record that every tensor-parallel rank holds the whole of `parameter`."""
    parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
    parameter.partition_dim = None  # type: ignore[attr-defined]
    return parameter


def partition_dim(parameter: nn.Parameter) -> int | None:
    """The dimension along which `parameter` is cut over tensor-parallel ranks; None when it is whole."""
    dim: int | None = getattr(parameter, "partition_dim", None)
    return dim

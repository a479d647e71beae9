"""Norms of what a checkpoint holds, and the differences of two, whatever their layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalm.checkpoint.optimizer_files import MASTER, MOMENTS
from megalm.checkpoint.source import Source, open_checkpoint
from megalm.models.gpt.weights import weight_table

BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a checkpoint, whole."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    norm: float
    """2-norm, in fp64."""


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of two checkpoints."""

    name: str
    largest: float
    """Largest difference of an element; infinity if one side lacks it or has another shape."""
    relative: float
    """2-norm of the difference over that of the first."""


def tensor_reports(checkpoint: Path, *, optimizer: bool = True) -> Iterator[TensorReport]:
    """Every weight, and with `optimizer` its fp32 master and moments. Holds one layer at a time."""
    for name, tensor in _tensors(open_checkpoint(checkpoint), optimizer=optimizer):
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield TensorReport(name, dtype, tuple(tensor.shape), _norm(tensor))


def tensor_differences(
    first: Path, second: Path, *, optimizer: bool = True, progress: Callable[[str, int], None] | None = None
) -> Iterator[TensorDifference]:
    """The tensors that are not bit-equal. Holds one layer of each at a time.

    `progress` receives the name of each tensor that was compared, and its bytes.
    """
    sources = open_checkpoint(first), open_checkpoint(second)
    left, right = (_without_twins(_tensors(source, optimizer=optimizer)) for source in sources)
    in_left, in_right = map(_weights, sources)
    ours, theirs = next(left, None), next(right, None)
    while ours is not None or theirs is not None:
        if ours is not None and theirs is not None and ours[0] == theirs[0]:
            difference = _difference(ours[0], ours[1], theirs[1])
            if progress is not None:
                progress(ours[0], ours[1].nbytes)
            if difference is not None:
                yield difference
            ours, theirs = next(left, None), next(right, None)
        elif ours is not None and (
            theirs is None
            or _weight_of(ours[0]) not in in_right
            or (_weight_of(theirs[0]) in in_left and _comes_first(ours[0], theirs[0]))
        ):
            yield TensorDifference(f"{ours[0]} (in the first alone)", float("inf"), float("inf"))
            ours = next(left, None)
        else:
            assert theirs is not None
            yield TensorDifference(f"{theirs[0]} (in the second alone)", float("inf"), float("inf"))
            theirs = next(right, None)


def _comes_first(ours: str, theirs: str) -> bool:
    """Whether the second checkpoint lacks the first's next tensor, rather than the first the second's.

    States follow their weight in the order of their keys, and the next weight follows them.
    """
    if not _is_state(ours):
        return False
    keys = (MASTER, *MOMENTS)
    return not _is_state(theirs) or keys.index(ours.split(" ")[-1]) < keys.index(theirs.split(" ")[-1])


def _weights(source: Source) -> set[str]:
    """Names of the weights of a checkpoint's model."""
    return {weight.name for weight in weight_table(source.shape)}


def _weight_of(name: str) -> str:
    """The weight that a tensor is, or is a state of."""
    return name.partition(" ")[0]


def _is_state(name: str) -> bool:
    """Whether this is an optimizer state, which the other checkpoint may lack while it has the weight."""
    return name.endswith(tuple(f" {key}" for key in (MASTER, *MOMENTS)))


def _tensors(source: Source, *, optimizer: bool) -> Iterator[tuple[str, Tensor]]:
    files = source.optimizer()
    for weight, tensor in source.layers.iterate():
        yield weight.name, tensor
        if optimizer and files.exists:
            pieces = files.state(weight, 0).pieces
            for key in (MASTER, *MOMENTS):
                if key in pieces:
                    yield f"{weight.name} {key}", files.whole(weight, key)


def _without_twins(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """All but masters that are their weight: fp32 without ZeRO keeps none, and a reshaped checkpoint writes one."""
    weight: tuple[str, Tensor] | None = None
    for name, tensor in tensors:
        if not _is_state(name):
            weight = (name, tensor)
        elif weight is not None and name == f"{weight[0]} {MASTER}" and torch.equal(weight[1], tensor):
            continue
        yield name, tensor


def _difference(name: str, ours: Tensor, theirs: Tensor) -> TensorDifference | None:
    if ours.shape != theirs.shape:
        return TensorDifference(f"{name} ({list(ours.shape)} and {list(theirs.shape)})", float("inf"), float("inf"))
    largest = torch.zeros((), dtype=torch.float64)
    squares = 0.0
    for own, other in zip(_blocks(ours), _blocks(theirs), strict=True):
        delta = own.double() - other.double()
        largest = torch.maximum(largest, delta.abs().max())  # of NaN, it is NaN
        squares += delta.square().sum().item()
    if largest.item() == 0.0:
        return None
    norm = _norm(ours)
    return TensorDifference(name, largest.item(), math.sqrt(squares) / norm if norm else float("inf"))


def _norm(tensor: Tensor) -> float:
    """The 2-norm, in fp64."""
    return math.sqrt(sum(block.double().square().sum().item() for block in _blocks(tensor)))


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """The elements, some at a time: a vocabulary's table in fp64, and what is computed of it, are gigabytes each."""
    return iter(tensor.reshape(-1).split(BLOCK_ELEMENTS) if tensor.numel() else ())

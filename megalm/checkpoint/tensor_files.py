"""Tensor files of a checkpoint: written through a hash to the disk, read without running what is in them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import torch

from megalm.checkpoint.durable import FileRecord, HashingFile, write_file
from megalm.errors import CheckpointError

Allowed = Callable[..., Any] | tuple[Callable[..., Any], str]


@dataclass
class FragmentAddress:
    """Where a parameter's share begins in its rank's flat optimizer partition, in elements: DeepSpeed's own record."""

    numel: int
    start: int


class InertState:
    """Stands for an object of DeepSpeed (a loss scaler) where DeepSpeed is not imported: holds its attributes alone."""


class LossScaler(InertState):
    """DeepSpeed's fixed scale."""


class DynamicLossScaler(InertState):
    """DeepSpeed's adaptive scale."""


_NAMES_ON_DISK = {
    FragmentAddress: "deepspeed.utils.tensor_fragment.fragment_address",
    LossScaler: "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    DynamicLossScaler: "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
}
"""By whose names these classes are written, so that DeepSpeed finds its own in files that megalm converts."""

INERT_STAND_INS: tuple[Allowed, ...] = (
    FragmentAddress,  # what reshaped checkpoints of megalm 0.1 call it
    *((stand_in, name) for stand_in, name in _NAMES_ON_DISK.items()),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
)
"""What DeepSpeed 0.19 pickles beside tensors and plain values, replaced by something without behaviour."""


_PythonPickler: Any = pickle._Pickler  # Of the two, the one that can be told names


class _Pickler(_PythonPickler):
    """Writes each stand-in as the class of DeepSpeed that it stands for."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        known = _NAMES_ON_DISK.get(obj) if isinstance(obj, type) else None
        if known is None:
            super().save_global(obj, name)
            return
        module, _, qualified = known.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{qualified}\n".encode())
        self.memoize(obj)


_pickling = ModuleType("pickle of stand-ins")
"""What torch.save takes for a pickle module."""
vars(_pickling).update(Pickler=_Pickler)


def snapshot(state: Any, *, copy: bool) -> Any:
    """The same structure with every tensor detached, on the host, and alone in its storage.

    torch.save writes whole storages, so a view of a flat buffer must be cloned, or each file holds the buffer. With
    `copy` every tensor is cloned, and so is any other object (a loss scaler), so that training may go on while the
    result is written.
    """
    if isinstance(state, torch.Tensor):
        host = state.detach().to("cpu")
        fills_storage = host.untyped_storage().nbytes() == host.numel() * host.element_size()
        moved = host.device != state.device
        return host if fills_storage and (moved or not copy) else host.clone()
    if isinstance(state, dict):
        return type(state)((key, snapshot(value, copy=copy)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(snapshot(value, copy=copy) for value in state)
    return deepcopy(state) if copy else state


def write_tensors(path: Path, state: Any) -> FileRecord:
    """Create a torch file of `state`, which `snapshot` has made, durably."""

    def produce(file: HashingFile) -> None:
        torch.save(state, file, pickle_module=_pickling)  # type: ignore[arg-type]  # it needs write() and flush() alone

    return write_file(path, produce)


ALLOWING = Lock()
"""torch keeps what it allows in one list for the whole process, and threads read at the same time."""


def read_tensors(path: Path, *, allowed: tuple[Allowed, ...] = INERT_STAND_INS, mmap: bool = False) -> Any:
    """Load a torch file to the host, with tensors, plain containers and the `allowed` classes only.

    With `mmap` the tensors are read when they are touched: slices of a large file cost what they weigh.

    Raises: CheckpointError if the file is damaged, or holds anything else.
    """
    try:
        with ALLOWING, torch.serialization.safe_globals(list(allowed)):
            # Files from before torch 1.6 are no zip archives and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} holds something other than tensors and is not loaded: {reason}") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def check_finite(state: Any, *, name: str) -> None:
    """Refuse to keep what a run could not continue from.

    Raises: CheckpointError if a tensor holds NaN or infinity.
    """
    for key, tensor in tensors_of(state):
        if not is_finite(tensor) and not _is_padded(state):
            raise CheckpointError(f"{name}: {key} holds NaN or infinity, and such a checkpoint is not published")


def _is_padded(state: Any) -> bool:
    """Whether these are ZeRO-3's shares, whose padding DeepSpeed leaves uninitialised; layer files tell there."""
    optimizer = state.get("optimizer_state_dict") if isinstance(state, dict) else None
    return isinstance(optimizer, dict) and "fp32_flat_groups" in optimizer


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; needs no memory of the tensor's size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = tensor.detach().aminmax()
    return bool(torch.isfinite(low) and torch.isfinite(high))


def tensors_of(state: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a nested structure, with a dotted name."""
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors_of(value, f"{name}.{key}" if name else str(key))
    elif isinstance(state, list | tuple):
        for position, value in enumerate(state):
            yield from tensors_of(value, f"{name}.{position}" if name else str(position))

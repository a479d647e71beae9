"""Torch files that pickle objects of programs that are not here, read without any of those programs.

torch's own weights-only unpickler does the reading. Every class or function that it does not know is given to it as an
inert class that keeps what the file says and does nothing, so that no name in a file is ever imported or called. Names
that torch blocks outright (os, sys, posix, ...) stay refused.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megalm.checkpoint.tensor_files import ALLOWING, Allowed, InertState, read_tensors
from megalm.errors import CheckpointError

_MAX_NAMES = 10_000
_MAX_PICKLE_BYTES = 1 << 30


class InertObject(InertState):
    """What an unknown class was called with, and the attributes that it was given."""

    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any, **_: Any) -> InertObject:
        self = object.__new__(cls)
        self.arguments = arguments
        return self

    def __init__(self, *arguments: Any, **_: Any) -> None:
        """Arguments were kept by __new__."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.__dict__["state"] = state


def read_with_stand_ins(path: Path, *, mmap: bool = False) -> Any:
    """Load a torch file; whatever is neither a tensor nor plain is an `InertObject` of the same name.

    Raises: CheckpointError if the file is damaged, or asks for something that torch blocks.
    """
    return read_tensors(path, allowed=tuple(_stand_in(name) for name in sorted(_unknown_names(path))), mmap=mmap)


def _stand_in(full_name: str) -> Allowed:
    module, _, name = full_name.rpartition(".")
    return type(name, (InertObject,), {"__module__": module}), full_name


def _unknown_names(path: Path) -> set[str]:
    """Names that the file refers to and torch does not load by itself."""
    try:
        if zipfile.is_zipfile(path):
            with ALLOWING:
                names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        else:
            with open(path, "rb") as file:
                names = _names_in_old_format(file)
    except Exception as error:  # a file from anywhere: pickletools and zipfile raise what they like
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if len(names) > _MAX_NAMES:
        raise CheckpointError(f"{path} refers to {len(names)} names, more than any checkpoint does")
    return names


def _names_in_old_format(file: BinaryIO) -> set[str]:
    """GLOBAL operands of the pickles that torch wrote one after another before it had zip files."""
    names = set()
    for _ in range(4):  # magic number, protocol, system, the object; then storages
        for operation, argument, position in pickletools.genops(file):
            if operation.name == "GLOBAL":
                names.add(str(argument).replace(" ", "."))
            if position is not None and position > _MAX_PICKLE_BYTES:
                raise ValueError("a pickle of more than 1 GB")
    return {name for name in names if not name.startswith("torch.") or name.startswith("torch.nn")}

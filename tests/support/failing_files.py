"""Spoils one file operation of a process: os-level functions are wrapped, the program is not touched.

Every operation under one folder that changes the disk, or waits for it, gets a label that is the same in every run: the
operation, the file and its number, as in `write global_stepN.tmp/manifest.json #0`. A run that only records yields the
list of places where a fault can be put, so that a call that is new in the program is a new case in the tests.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAULTS = ("kill", "ENOSPC", "EIO", "short write")
_ANY_STEP = re.compile(r"global_step\d+")
_LEFT_ALONE = re.compile(r"metrics\.jsonl")


class FailingFiles:
    """Labels the operations of this process under `folder`, and spoils the one that `arm` names."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = os.path.realpath(folder)
        self.labels: list[str] = []
        self._numbers: Counter[str] = Counter()
        self._armed: tuple[str, str] | None = None
        self.has_struck = False

    def arm(self, label: str | None, fault: str = "") -> None:
        """Count from 0 again; spoil the call with this label, or none."""
        self.labels.clear()
        self._numbers.clear()
        self._armed = None if label is None else (label, fault)
        self.has_struck = False

    def install(self) -> None:
        """Wrap the functions of this process. There is no way back."""
        for name in (
            "fsync",
            "fdatasync",
            "replace",
            "rename",
            "unlink",
            "remove",
            "rmdir",
            "mkdir",
            "link",
            "symlink",
        ):
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        os.open = self._wrapped_os_open(os.open)
        opened = self._wrapped_open(builtins.open)
        builtins.open = io.open = opened

    def strikes(self, operation: str, path: str, *, size: int = 0) -> str | None:
        """Label one call; the fault if it is this one's turn."""
        if not path.startswith(self._folder) or _LEFT_ALONE.search(path):
            return None
        name = _ANY_STEP.sub("global_stepN", os.path.relpath(path, self._folder))
        key = f"{operation} {name}"
        label = f"{key} #{self._numbers[key]}"
        self._numbers[key] += 1
        self.labels.append(label)
        if self._armed is None or self._armed[0] != label or self.has_struck:
            return None
        self.has_struck = True
        fault = self._armed[1]
        if fault == "kill" and operation != "write":
            os.kill(os.getpid(), signal.SIGKILL)
        return fault

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **options: Any) -> Any:
            _raise(self.strikes(name, _path_of(target, options.get("dir_fd"))), target)
            return original(target, *args, **options)

        return call

    def _wrapped_os_open(self, original: Callable[..., int]) -> Callable[..., int]:
        def call(target: Any, *args: Any, **options: Any) -> int:
            _raise(self.strikes("open", _path_of(target, options.get("dir_fd"))), target)
            return original(target, *args, **options)

        return call

    def _wrapped_open(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wxa+"):
                return original(file, mode, buffering, *args, **options)
            path = _path_of(file, None)
            _raise(self.strikes("open", path), file)
            if buffering == 0 and path.startswith(self._folder):
                return _FailingFile(self, path, mode.replace("b", ""))
            return original(file, mode, buffering, *args, **options)

        return call


class _FailingFile(io.FileIO):
    """An unbuffered file whose writes have labels."""

    def __init__(self, files: FailingFiles, path: str, mode: str) -> None:
        super().__init__(path, mode)
        self._files = files
        self._path = path

    def write(self, data: Any) -> int:
        fault = self._files.strikes("write", self._path)
        if fault is None:
            return super().write(data)
        half = memoryview(data).cast("B")[: memoryview(data).nbytes // 2]
        if fault == "short write":
            # One byte is the least that a file system takes without an error.
            return super().write(half if len(half) else data)
        super().write(half)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        _raise(fault, self._path)
        raise AssertionError("unreachable: every fault but a short write raises")


def _raise(fault: str | None, path: Any) -> None:
    if fault in ("ENOSPC", "EIO"):
        number = getattr(errno, fault)
        raise OSError(number, os.strerror(number), str(path))


def _path_of(target: Any, dir_fd: int | None) -> str:
    if isinstance(target, int):
        return os.readlink(f"/proc/self/fd/{target}")
    if hasattr(target, "fileno"):
        return os.readlink(f"/proc/self/fd/{target.fileno()}")
    path = os.fsdecode(os.fspath(target))
    if dir_fd is not None and not os.path.isabs(path):
        return os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
    return os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))


def failpoints(labels: list[str]) -> list[tuple[str, str]]:
    """(label, fault) of every case: each call with each fault that it can have.

    Of the many writes of one file the first, the middle and the last one stand for all.
    """
    lasts = Counter(label.rpartition(" #")[0] for label in labels)
    cases = []
    for label in labels:
        key, _, number = label.rpartition(" #")
        count = lasts[key]
        is_write = label.startswith("write ")
        if is_write and int(number) not in {0, count // 2, count - 1}:
            continue
        cases += [(label, fault) for fault in FAULTS if is_write or fault != "short write"]
    return list(dict.fromkeys(cases))

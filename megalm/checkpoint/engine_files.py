"""DeepSpeed's reading and writing of checkpoint files, replaced by megalm's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megalm.checkpoint.durable import FileRecord, make_folder
from megalm.checkpoint.tensor_files import Allowed, read_tensors, snapshot, write_tensors
from megalm.errors import CheckpointError

DEEPSPEED_CLASSES: tuple[Allowed, ...] = (fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum)


class FileEngine(CheckpointEngine):
    """What DeepSpeed calls for each file of a checkpoint.

    A write that fails is remembered rather than raised: DeepSpeed waits at barriers between the files, where a rank
    that had left would hang the others. Whoever started the save reads `failure` after the last barrier.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = "megalm"
        self.records: list[FileRecord] = []
        self.failure: Exception | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to prepare."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Create a folder; a failure is remembered."""
        try:
            make_folder(Path(path))
        except OSError as error:
            self.failure = self.failure or error

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file durably, unless an earlier one failed."""
        if self.failure is not None:
            return
        try:
            self.records.append(write_tensors(Path(path), snapshot(state_dict, copy=False)))
        except Exception as error:
            self.failure = error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file to the host without running anything in it; DeepSpeed copies to the device."""
        return read_tensors(Path(path), allowed=DEEPSPEED_CLASSES)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Nothing to commit: the folder is published elsewhere."""
        return True

    def preserves_storage_sharing(self) -> bool:
        """False: views are cloned here, and DeepSpeed need not."""
        return False


@contextlib.contextmanager
def file_engine_of(engine: Any) -> Iterator[FileEngine]:
    """Let a DeepSpeed engine read and write through a `FileEngine` inside the context.

    DeepSpeed's recovery scripts are left out: they would be two unhashed files beside every checkpoint.
    """
    files = FileEngine()
    original = engine.checkpoint_engine
    engine.checkpoint_engine = files
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield files
    finally:
        engine.checkpoint_engine = original
        del engine._copy_recovery_script


def write_engine_files(engine: Any, folder: Path, files: FileEngine) -> None:
    """Let DeepSpeed write its files into `folder`; what failed is in `files.failure`.

    Communicates: DeepSpeed's barriers over the world.
    """
    try:
        engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    except Exception as error:
        files.failure = files.failure or error


def read_engine_files(engine: Any, folder: Path, *, optimizer: bool, module_only: bool) -> None:
    """Let DeepSpeed read its own files back, into an engine of the same layout.

    With `module_only` the weights alone are read; without `optimizer` its state stays fresh.
    Raises: CheckpointError if DeepSpeed found nothing to load, which it reports without an error.
    """
    with file_engine_of(engine):
        path, _ = engine.load_checkpoint(
            str(folder.parent),
            tag=folder.name,
            load_optimizer_states=optimizer and not module_only,
            load_lr_scheduler_states=False,
            load_module_only=module_only,
        )
    if path is None:
        raise CheckpointError(f"{folder} holds no engine state for this rank")

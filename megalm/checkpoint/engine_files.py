"""DeepSpeed's writing of checkpoint files, through megalm's. Reading needs no DeepSpeed: see `restore`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from megalm.checkpoint import layout
from megalm.checkpoint.durable import FileRecord, make_folder
from megalm.checkpoint.optimizer_files import PARAMETER_GROUPS
from megalm.checkpoint.restore import named_parameters
from megalm.checkpoint.tensor_files import check_finite, read_tensors, snapshot, write_tensors
from megalm.checkpoint.universal import DESCRIPTION_KEY, INFO_KEY, universal_info
from megalm.models.gpt.shape import GPTShape
from megalm.topology.topology import Topology


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
        """Take one file, unless an earlier one failed."""
        if self.failure is not None:
            return
        if "module" in state_dict:
            # The layer files hold the weights; a model of one stage would be written twice.
            state_dict = {**state_dict, "module": None}
        try:
            self.take(Path(path), state_dict)
        except Exception as error:
            self.failure = error

    def take(self, path: Path, state_dict: Any) -> None:
        """Write one file durably."""
        self.put(path, snapshot(state_dict, copy=False))

    def put(self, path: Path, state: Any) -> None:
        """Write what `snapshot` has made, unless it holds NaN or infinity."""
        check_finite(state, name=path.name)
        self.records.append(write_tensors(path, state))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file to the host without running anything in it."""
        return read_tensors(Path(path))

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Nothing to commit: the folder is published elsewhere."""
        return True

    def preserves_storage_sharing(self) -> bool:
        """False: views are cloned here, and DeepSpeed need not."""
        return False


@contextlib.contextmanager
def _writing_through(engine: Any, files: FileEngine) -> Iterator[None]:
    """Let a DeepSpeed engine write through `files` inside the context.

    DeepSpeed's recovery scripts are left out: they would be two unhashed files beside every checkpoint.
    """
    original = engine.checkpoint_engine
    engine.checkpoint_engine = files
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield
    finally:
        engine.checkpoint_engine = original
        del engine._copy_recovery_script


def write_engine_files(
    engine: Any, folder: Path, files: FileEngine, *, topology: Topology, description: Mapping[str, Any]
) -> None:
    """Let DeepSpeed write its files into `folder`; what failed is in `files.failure`.

    Beside its counters the engine-state files hold `description`, and what DeepSpeed's converter to universal
    checkpoints asks of a trainer. A model of one stage gets the layer files of a pipeline, so that whatever reads
    weights reads one form.
    Communicates: under ZeRO-3 an all-gather of every layer over dp, otherwise nothing.
    """
    before = getattr(engine.optimizer, "checkpoint_event_prologue", None)
    after = getattr(engine.optimizer, "checkpoint_event_epilogue", None)
    if before is not None:
        before()
    try:
        # The parts of DeepSpeedEngine.save_checkpoint that write; its barriers and its plain `latest` are left out.
        shape: GPTShape = engine.module.plan.shape
        state = {
            PARAMETER_GROUPS: _parameter_groups(engine),
            INFO_KEY: universal_info(shape, pipelined=isinstance(engine.module, PipelineModule)),
            DESCRIPTION_KEY: dict(description),
        }
        with _writing_through(engine, files):
            engine._save_checkpoint(str(folder.parent), folder.name, client_state=state)
            if engine.save_zero_checkpoint:
                engine._save_zero_checkpoint(str(folder.parent), folder.name)
    except Exception as error:
        files.failure = files.failure or error
    if after is not None:
        after()
    if not isinstance(engine.module, PipelineModule):
        _write_layers_of_single_stage(engine, folder, files, topology=topology)


def _write_layers_of_single_stage(engine: Any, folder: Path, files: FileEngine, *, topology: Topology) -> None:
    sharded = bool(engine.zero_optimization_partition_weights())
    named = sorted(named_parameters(engine.module), key=lambda pair: pair[0].layer)
    for index, layer in groupby(named, key=lambda pair: pair[0].layer):
        own = list(layer)
        with deepspeed.zero.GatheredParameters([parameter for _, parameter in own], enabled=sharded):
            if topology.dp.is_first:
                state = {weight.key: parameter for weight, parameter in own}
                files.save(state, str(folder / layout.layer_file(index, topology.tp.rank)))


def _parameter_groups(engine: Any) -> list[list[str]] | None:
    """Names of the weights in each group of an optimizer whose own files do not tell; None where they do."""
    names = {id(parameter): weight.name for weight, parameter in named_parameters(engine.module)}
    optimizer = engine.optimizer
    groups: list[Any] | None = getattr(optimizer, "fp16_groups", None)
    if isinstance(optimizer, torch.optim.Optimizer):
        groups = [group["params"] for group in optimizer.param_groups]
    return None if groups is None else [[names[id(parameter)] for parameter in group] for group in groups]


class HostCopies(FileEngine):
    """Keeps copies in host memory instead of writing, so that training may go on while `write` works."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: list[tuple[Path, Any]] = []

    def take(self, path: Path, state_dict: Any) -> None:
        """Copy one file's content."""
        self._copies.append((path, snapshot(state_dict, copy=True)))

    def write(self) -> None:
        """Write every copy durably, letting go of each; what failed is in `failure`."""
        while self._copies and self.failure is None:
            path, state = self._copies.pop(0)
            try:
                self.put(path, state)
            except Exception as error:
                self.failure = error
        self._copies.clear()

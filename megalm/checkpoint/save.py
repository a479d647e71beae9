"""Saving a run: whole or absent."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint import layout
from megalm.checkpoint.agreement import agree, exchange
from megalm.checkpoint.durable import (
    FileRecord,
    make_folder,
    publish_folder,
    remove_folder,
    replace_text,
    write_text,
)
from megalm.checkpoint.engine_files import file_engine_of, write_engine_files
from megalm.checkpoint.identity import model_fields
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.retention import remove_outdated
from megalm.checkpoint.tensor_files import snapshot, write_tensors
from megalm.config.deepspeed_json import effective_zero_stage
from megalm.config.root import Config
from megalm.config.yaml_file import config_to_yaml
from megalm.topology.topology import Topology


@dataclass(frozen=True)
class SaveReport:
    """Where a checkpoint lies, and what it cost."""

    path: Path
    num_bytes: int
    elapsed_seconds: float
    removed: tuple[Path, ...] = ()
    """Older checkpoints that were removed, in keeping with keep_last. Known to the first rank."""
    problems: tuple[str, ...] = ()
    """What went wrong after the checkpoint was published. Known to the first rank."""


def save_checkpoint(
    engine: Any,
    folder: str | Path,
    state: Mapping[str, Any],
    *,
    config: Config,
    topology: Topology,
    rng: Mapping[str, Any] | None = None,
    keep_last: int | None = None,
) -> SaveReport:
    """Write `folder/global_stepN` and point `latest` to it, N being `state["step"]`. All ranks call it together.

    `engine` is the DeepSpeed engine; `state` is what train_state.json holds (plain JSON values); `rng` is this rank's
    random-number state, torch's own CPU and device states when not given. Everything is written to a temporary folder,
    fsynced and hashed; then the folder is renamed, then `latest` replaced, then old checkpoints are removed.

    Communicates: DeepSpeed's barriers, and four all-gathers of small objects over the world.
    Raises: CheckpointError, the same on every rank, if a rank could not write. Then nothing was published, and the
    checkpoints that were there still are.
    """
    started = time.monotonic()
    folder = Path(folder)
    step = int(state["step"])
    final = folder / layout.step_folder(step)
    temporary = folder / layout.temporary_folder(step)

    doing = f"saving {final}"
    with _collectively(topology, doing):
        if topology.world.is_first:
            make_folder(folder)
            _clear_leftovers(folder)
            make_folder(temporary)
    try:
        records = _write_rank_files(engine, temporary, topology=topology, rng=rng, doing=doing)
        with _collectively(topology, doing):
            if topology.world.is_first:
                manifest = _describe(config, topology, step=step, records=records)
                _write_common_files(temporary, manifest, state=state, config=config)
                publish_folder(temporary, final, replaced=folder / layout.replaced_folder(step))
                replace_text(folder / layout.LATEST, final.name)
    except Exception:
        if topology.world.is_first:
            with contextlib.suppress(OSError):
                remove_folder(temporary)
        raise

    removed: tuple[Path, ...] = ()
    problems: tuple[str, ...] = ()
    if topology.world.is_first and keep_last is not None:
        removed, problems = remove_outdated(folder, keep_last=keep_last, newest=final)
    return SaveReport(
        path=final,
        num_bytes=sum(record.bytes for record in records),
        elapsed_seconds=time.monotonic() - started,
        removed=removed,
        problems=problems,
    )


def _write_rank_files(
    engine: Any, temporary: Path, *, topology: Topology, rng: Mapping[str, Any] | None, doing: str
) -> list[FileRecord]:
    """Write this rank's files; returns the records of all ranks on every rank."""
    with file_engine_of(engine) as files:
        write_engine_files(engine, temporary, files, topology=topology)
    failure, records = files.failure, files.records
    if failure is None:
        try:
            name = layout.rng_file(tp_rank=topology.tp.rank, pp_rank=topology.pp.rank, dp_rank=topology.dp.rank)
            state = default_rng_state() if rng is None else rng
            records.append(write_tensors(temporary / name, snapshot(state, copy=False)))
        except Exception as error:
            failure = error
    agree(failure, topology.world, doing=doing)
    return [record for own in exchange(records, topology.world) for record in own]


def _write_common_files(temporary: Path, manifest: Manifest, *, state: Mapping[str, Any], config: Config) -> None:
    state_text = json.dumps(dict(state), indent=1, allow_nan=False) + "\n"
    records = [
        *manifest.files,
        write_text(temporary / layout.TRAIN_STATE, state_text),
        write_text(temporary / layout.CONFIG, config_to_yaml(config)),
    ]
    complete = replace(manifest, files=tuple(sorted(records, key=lambda record: record.name)))
    write_text(temporary / layout.MANIFEST, complete.to_json())


def _describe(config: Config, topology: Topology, *, step: int, records: list[FileRecord]) -> Manifest:
    sizes = topology.layout
    return Manifest(
        step=step,
        layout={
            "tp": sizes.tp,
            "pp": sizes.pp,
            "dp": sizes.dp,
            "zero_stage": effective_zero_stage(config),
            "dtype": config.training.dtype,
        },
        model=model_fields(config),
        versions=versions(),
        files=tuple(records),
    )


def versions() -> dict[str, str]:
    """Versions of what decides the content of a checkpoint."""
    found = {"python": platform.python_version()}
    for package in ("megalm", "torch", "deepspeed", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def default_rng_state() -> dict[str, Any]:
    """torch's own random-number states."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["device"] = torch.cuda.get_rng_state()
    return state


def _clear_leftovers(folder: Path) -> None:
    """Remove temporary folders of saves that were interrupted."""
    for path in folder.glob("global_step*.tmp"):
        remove_folder(path)


@contextlib.contextmanager
def _collectively(topology: Topology, doing: str) -> Iterator[None]:
    """Run a block on every rank, then let all of them raise if one did."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    agree(failure, topology.world, doing=doing)

"""Saving a run: whole or absent."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint import layout
from megalm.checkpoint.agreement import agree
from megalm.checkpoint.draft import Draft
from megalm.checkpoint.engine_files import FileEngine, write_engine_files
from megalm.checkpoint.retention import Retention
from megalm.checkpoint.universal import description
from megalm.config.root import Config
from megalm.topology.agree import exchange
from megalm.topology.topology import Topology


@dataclass(frozen=True)
class SaveReport:
    """Where a checkpoint lies, and what it cost."""

    path: Path
    num_bytes: int
    """Of all ranks' files. After a save in the background, known to the first rank."""
    elapsed_seconds: float
    """From the start of the save to its publication."""
    stall_seconds: float
    """Time that training stood still for it."""
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
    keep_every: int | None = None,
) -> SaveReport:
    """Write `folder/global_stepN` and point `latest` to it, N being `state["step"]`. All ranks call it together.

    `engine` is the DeepSpeed engine; `state` is what train_state.json holds (plain JSON values); `rng` is this rank's
    random-number state, torch's own CPU and device states when not given. Everything is written to a temporary folder,
    fsynced and hashed; then the folder is renamed, then `latest` replaced, then old checkpoints are removed, but for
    the `keep_last` newest and those whose step is a multiple of `keep_every`.

    Communicates: four all-gathers of small objects over the world, and what `write_engine_files` does.
    Raises: CheckpointError, the same on every rank, if a rank could not write or a tensor holds NaN or infinity. Then
    nothing was published, and the checkpoints that were there still are.
    """
    started = time.monotonic()
    retention = Retention(keep_last=keep_last, keep_every=keep_every)
    draft = Draft.of(Path(folder), state, config=config, sizes=topology.layout, retention=retention)
    begin_draft(draft, topology=topology)
    doing = f"saving {draft.final}"
    problems: tuple[str, ...] = ()
    try:
        files = FileEngine()
        write_rank_files(engine, draft, files, topology=topology, rng=rng)
        agree(files.failure, topology.world, doing=doing)
        records = [record for own in exchange(files.records, topology.world) for record in own]
        with collectively(topology, doing):
            if topology.world.is_first:
                problems = draft.publish(records)
    except Exception:
        if topology.world.is_first:
            draft.discard()
        raise
    elapsed = time.monotonic() - started
    return SaveReport(
        path=draft.final,
        num_bytes=sum(record.bytes for record in records),
        elapsed_seconds=elapsed,
        stall_seconds=elapsed,
        problems=problems,
    )


def begin_draft(draft: Draft, *, topology: Topology) -> None:
    """Make the folder that every rank writes to.

    Raises: CheckpointError, the same on every rank, if it cannot be made.
    """
    with collectively(topology, f"saving {draft.final}"):
        if topology.world.is_first:
            draft.begin()


def write_rank_files(
    engine: Any, draft: Draft, files: FileEngine, *, topology: Topology, rng: Mapping[str, Any] | None
) -> None:
    """Pass everything that this rank holds to `files`; what failed is in `files.failure`."""
    known = description(draft.manifest, draft.state)
    write_engine_files(engine, draft.temporary, files, topology=topology, description=known)
    name = layout.rng_file(tp_rank=topology.tp.rank, pp_rank=topology.pp.rank, dp_rank=topology.dp.rank)
    files.save(dict(default_rng_state() if rng is None else rng), str(draft.temporary / name))


def default_rng_state() -> dict[str, Any]:
    """torch's own random-number states."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["device"] = torch.cuda.get_rng_state()
    return state


@contextlib.contextmanager
def collectively(topology: Topology, doing: str) -> Iterator[None]:
    """Run a block on every rank, then let all of them raise if one did."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    agree(failure, topology.world, doing=doing)

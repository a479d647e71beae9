"""Loading a run's state back into its engine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.checkpoint import layout
from megalm.checkpoint.agreement import agree
from megalm.checkpoint.engine_files import read_engine_files
from megalm.checkpoint.identity import check_same_model
from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.checkpoint.tensor_files import read_tensors
from megalm.config.root import Config
from megalm.errors import CheckpointError
from megalm.topology.topology import Topology


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint holds beside the engine's state."""

    path: Path
    manifest: Manifest
    state: dict[str, Any]
    """The content of train_state.json."""
    rng: dict[str, Any] | None
    """This rank's random-number state; None if the checkpoint has none for this layout."""


def load_checkpoint(
    engine: Any,
    path: str | Path,
    *,
    config: Config,
    topology: Topology,
    load_optimizer: bool = True,
    weights_only: bool = False,
) -> Loaded:
    """Read a checkpoint that `find_checkpoint` has verified into a DeepSpeed engine. All ranks call it together.

    Without `load_optimizer` the optimizer starts fresh from the loaded weights; with `weights_only` so do the
    engine's own step counters (--finetune).

    Communicates: DeepSpeed's synchronisation of tied weights, and all-gathers of small objects over the world.
    Raises: CheckpointError, the same on every rank, if the checkpoint is of another model or layout, or unreadable.
    """
    path = Path(path)
    manifest = read_manifest(path)
    check_same_model(manifest, config, path=path)
    _check_same_layout(manifest, config, topology, path=path)
    failure: Exception | None = None
    try:
        read_engine_files(engine, path, optimizer=load_optimizer, module_only=weights_only)
    except Exception as error:
        failure = error
    agree(failure, topology.world, doing=f"loading {path}")
    return Loaded(path=path, manifest=manifest, state=read_train_state(path), rng=_read_rng(path, topology))


def read_train_state(path: Path) -> dict[str, Any]:
    """The content of train_state.json.

    Raises: CheckpointError if it cannot be read or is no JSON object.
    """
    file = path / layout.TRAIN_STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return state


def _check_same_layout(manifest: Manifest, config: Config, topology: Topology, *, path: Path) -> None:
    sizes = topology.layout
    current = {"tp": sizes.tp, "pp": sizes.pp, "dp": sizes.dp, "zero_stage": config.parallel.zero_stage}
    stored = {name: manifest.layout.get(name) for name in current}
    if stored != current:
        raise CheckpointError(
            f"{path} was saved with {_words(stored)}, and this run has {_words(current)}\n"
            "  start this run with the checkpoint's layout"
        )


def _words(layout_sizes: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in layout_sizes.items())


def _read_rng(path: Path, topology: Topology) -> dict[str, Any] | None:
    name = layout.rng_file(tp_rank=topology.tp.rank, pp_rank=topology.pp.rank, dp_rank=topology.dp.rank)
    if not (path / name).is_file():
        return None
    state: dict[str, Any] = read_tensors(path / name)
    return state

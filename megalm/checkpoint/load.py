"""Loading a run's state into an engine, whatever layouts the two have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megalm.checkpoint import layout
from megalm.checkpoint.agreement import agree
from megalm.checkpoint.identity import check_same_model
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.optimizer_files import read_engine_state
from megalm.checkpoint.restore import Restorer
from megalm.checkpoint.source import Source, open_checkpoint
from megalm.checkpoint.tensor_files import read_tensors
from megalm.config.root import Config
from megalm.topology.agree import together
from megalm.topology.topology import Topology


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint holds beside the engine's state."""

    state: dict[str, Any]
    """The content of train_state.json."""
    rng: dict[str, Any] | None
    """This rank's random-number state; None if the checkpoint is of another layout."""
    drift: dict[str, float]
    """Replicated weights whose stored copies differ, with the distance from the mean that was loaded."""


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

    The checkpoint may be of any tp, pp, dp, ZeRO stage, dtype and vocabulary padding. Without `load_optimizer` the
    optimizer starts fresh from the loaded weights; with `weights_only` so do the engine's step counters (--finetune).

    Communicates: two all-gathers of small objects over the world; under ZeRO-3, an all-gather of small parameters.
    Raises: CheckpointError, the same on every rank, if the checkpoint is of another model, or unreadable to a rank.
    """
    path = Path(path)
    source = together(topology, partial(_open, path, config))
    failure: Exception | None = None
    drift: dict[str, float] = {}
    rng = None
    try:
        optimizer = source.optimizer() if load_optimizer and not weights_only else None
        restorer = Restorer(engine, source.layers, optimizer, tp=topology.tp, seed=config.training.seed)
        with restoring(engine):
            restorer.restore()
        drift = source.layers.drift
        if not weights_only:
            _restore_counters(engine, source)
        rng = _read_rng(path, topology, source.manifest)
    except Exception as error:
        failure = error
    agree(failure, topology.world, doing=f"loading {path}")
    return Loaded(state=source.train_state, rng=rng, drift=drift)


def _open(path: Path, config: Config) -> Source:
    source = open_checkpoint(path)
    check_same_model(source.manifest, config, path=path)
    return source


@contextlib.contextmanager
def restoring(engine: Any) -> Iterator[None]:
    """ZeRO-3 shares out its parameters before a load and gathers the small ones after it."""
    before = getattr(engine.optimizer, "checkpoint_event_prologue", None)
    after = getattr(engine.optimizer, "checkpoint_event_epilogue", None)
    if before is not None:
        before()
    try:
        yield
    finally:
        if after is not None:
            after()


def _restore_counters(engine: Any, source: Source) -> None:
    names = (layout.model_file(0), layout.sharded_model_file(dp_rank=0, mp_rank=0))
    for name in names:
        for counter, value in read_engine_state(source.folder / name, read=source.read).items():
            if counter in ("global_steps", "global_samples", "skipped_steps") and isinstance(value, int):
                setattr(engine, counter, value)


def _read_rng(path: Path, topology: Topology, manifest: Manifest) -> dict[str, Any] | None:
    sizes = topology.layout
    if any(manifest.layout.get(name) != getattr(sizes, name) for name in ("tp", "pp", "dp")):
        return None
    name = layout.rng_file(tp_rank=topology.tp.rank, pp_rank=topology.pp.rank, dp_rank=topology.dp.rank)
    if not (path / name).is_file():
        return None
    state: dict[str, Any] = read_tensors(path / name)
    return state

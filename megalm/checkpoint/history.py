"""Lineages as they lie on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megalm.checkpoint.lineage import Lineage, Tip, lineage_in
from megalm.checkpoint.manifest import read_manifest
from megalm.checkpoint.source import read_train_state
from megalm.errors import CheckpointError

_NUM_THREADS = 8
"""Network disks answer late, and many at once."""


def read_lineages(checkpoints: Sequence[Path]) -> list[Lineage | None]:
    """The lineage of each, from its smallest file; None where that says none or cannot be read."""
    with ThreadPoolExecutor(max_workers=_NUM_THREADS) as pool:
        return list(pool.map(_read_lineage, checkpoints))


def read_tip(checkpoint: Path, *, step: int) -> Tip:
    """A checkpoint that may be damaged, as a tip: its manifest, which knows its own hash, or else its train state."""
    try:
        lineage = read_manifest(checkpoint).lineage
    except CheckpointError:
        lineage = None
    return Tip(step, _read_lineage(checkpoint) if lineage is None else lineage)


def own_checkpoints(tip: Tip, published: Sequence[tuple[int, Path]]) -> list[Path]:
    """Those of `published`, which are (step, path), that the run of `tip` came by, in the order given."""
    earlier = [(step, path) for step, path in published if step <= tip.step]
    if tip.lineage is None:
        return [path for _, path in earlier]
    lineages = read_lineages([path for _, path in earlier])
    return [path for (step, path), own in zip(earlier, lineages, strict=True) if tip.has_behind(step, own)]


def _read_lineage(checkpoint: Path) -> Lineage | None:
    try:
        return lineage_in(read_train_state(checkpoint))
    except CheckpointError:
        return None

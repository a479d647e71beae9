"""Which checkpoints of a folder stay."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint import layout
from megalm.checkpoint.durable import remove_folder
from megalm.checkpoint.history import own_checkpoints
from megalm.checkpoint.lineage import Lineage, Tip


@dataclass(frozen=True)
class Retention:
    """How many checkpoints stay."""

    keep_last: int | None = None
    """Newest ones that stay; all when not given."""
    keep_every: int | None = None
    """Those whose step is a multiple of this stay besides."""


def published_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every folder with a checkpoint's name, newest first; `.old` ones after their successor.

    A link to a folder is one: checkpoints are moved to larger disks so.
    A folder `global_stepN.old` is a whole checkpoint that was being replaced by one of the same step when the writer
    stopped.
    """
    found = []
    for path in folder.iterdir():
        replaced = path.name.endswith(".old")
        step = layout.parse_step(path.name.removesuffix(".old"))
        if step is not None and path.is_dir():
            found.append((step, not replaced, path))
    return [(step, path) for step, _, path in sorted(found, key=lambda entry: entry[:2], reverse=True)]


def remove_outdated(
    folder: Path, retention: Retention, *, newest: Path, lineage: Lineage | None = None
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Remove the checkpoints that need not stay: (what was removed, what could not be).

    `newest`, of `lineage`, was just published and always stays, so the folder never loses its last valid checkpoint; of
    those that the run came by, the ones with the highest steps stay. What it left behind when it was taken back does
    not count, and stays. A folder that cannot be removed is no reason to stop a run.
    """
    if retention.keep_last is None:
        return (), ()
    every, published = retention.keep_every, published_checkpoints(folder)
    last = max((step for step, path in published if path == newest), default=0)
    others = [
        (step, path)
        for step, path in published
        if path != newest and step <= last and not (every is not None and step % every == 0)
    ]
    num_kept = max(0, retention.keep_last - 1)
    if len(others) <= num_kept:
        return (), ()
    removed, problems = [], []
    for path in own_checkpoints(Tip(last, lineage), others)[num_kept:]:
        try:
            remove_folder(path)
            removed.append(path)
        except OSError as error:
            problems.append(f"{path} could not be removed: {error}")
    return tuple(removed), tuple(problems)

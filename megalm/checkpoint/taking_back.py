"""Roll-backs as they lie on the disk."""

from __future__ import annotations

import json
from pathlib import Path

from megalm.checkpoint import layout
from megalm.checkpoint.durable import rename, replace_text, writing_to
from megalm.checkpoint.history import own_checkpoints
from megalm.checkpoint.lineage import Tip
from megalm.checkpoint.retention import published_checkpoints
from megalm.checkpoint.roll_backs import RollBack, parse_roll_backs, to_json
from megalm.errors import CheckpointError
from megalm.telemetry.aside import free_name


def read_roll_backs(folder: Path) -> tuple[RollBack, ...]:
    """What the runs that saved to `folder` leave out, also those that have not saved since.

    Raises: CheckpointError if the file cannot be read.
    """
    file = folder / layout.ROLL_BACKS
    try:
        return parse_roll_backs(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}\n"
            "  it says which steps are left out; without it they are trained on, but for those of "
            "--skip-train-iteration-range"
        ) from error


def take_back(folder: Path, tip: Tip, wanted: RollBack) -> tuple[Path, RollBack] | None:
    """Point `latest` to the newest checkpoint from before the steps that `wanted` leaves out and write down which they
    are; where there is none, to the newest from before the spike, leaving out the steps after it.

    Of the checkpoints that the run of `tip` came by. Returns what was decided; None, and nothing is changed, if all of
    them may hold the spike. A run that dies after the first of the two writes meets the spike again.
    Raises: CheckpointError if the folder cannot be written.
    """
    with writing_to(folder):
        path = newest_before(folder, tip, wanted)
        if path is None:
            return None
        decided = RollBack(max(wanted.first, _step(path) + 1), wanted.last, wanted.spike)
        known = read_roll_backs(folder)
        replace_text(folder / layout.LATEST, path.name)
        replace_text(folder / layout.ROLL_BACKS, json.dumps(to_json([*known, decided]), indent=1) + "\n")
    return path, decided


def newest_before(folder: Path, tip: Tip, wanted: RollBack) -> Path | None:
    """The newest checkpoint of the run of `tip` from before the steps that `wanted` leaves out, or else from before its
    spike."""
    own = own_checkpoints(tip, published_checkpoints(folder))
    before = [path for path in own if _step(path) < wanted.first]
    return next(iter(before or [path for path in own if _step(path) < wanted.spike]), None)


def set_aside_roll_backs(folder: Path) -> Path | None:
    """Rename what another run left out, of which `folder` has no checkpoints any more.

    Returns the new name; None if there is nothing of the kind.
    Raises: CheckpointError if it cannot be renamed.
    """
    file = folder / layout.ROLL_BACKS
    if not file.exists():
        return None
    aside = free_name(file)
    with writing_to(aside):
        rename(file, aside)
    return aside


def _step(path: Path) -> int:
    step = layout.parse_step(path.name.removesuffix(".old"))
    assert step is not None, path
    return step

"""Which checkpoints of a folder stay."""

from __future__ import annotations

from pathlib import Path

from megalm.checkpoint import layout
from megalm.checkpoint.durable import remove_folder


def published_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every folder with a checkpoint's name, newest first; `.old` ones after their successor.

    A folder `global_stepN.old` is a whole checkpoint that was being replaced by one of the same step when the writer
    stopped.
    """
    found = []
    for path in folder.iterdir():
        replaced = path.name.endswith(".old")
        step = layout.parse_step(path.name.removesuffix(".old"))
        if step is not None and path.is_dir() and not path.is_symlink():
            found.append((step, not replaced, path))
    return [(step, path) for step, _, path in sorted(found, key=lambda entry: entry[:2], reverse=True)]


def remove_outdated(folder: Path, *, keep_last: int, newest: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Remove all but `keep_last` checkpoints: (what was removed, what could not be).

    `newest` was just published and always stays, so the folder never loses its last valid checkpoint; of the others,
    those with the highest steps stay. A folder that cannot be removed is no reason to stop a run.
    """
    others = [path for _, path in published_checkpoints(folder) if path != newest]
    removed, problems = [], []
    for path in others[max(1, keep_last) - 1 :]:
        try:
            remove_folder(path)
            removed.append(path)
        except OSError as error:
            problems.append(f"{path} could not be removed: {error}")
    return tuple(removed), tuple(problems)

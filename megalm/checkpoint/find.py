"""Which checkpoint of a folder a run continues from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megalm.checkpoint import layout
from megalm.checkpoint.bigscience import is_bigscience
from megalm.checkpoint.manifest import check_file_name, read_manifest, verify
from megalm.checkpoint.retention import published_checkpoints
from megalm.errors import CheckpointError
from megalm.topology.agree import exchange
from megalm.topology.group import SOLO, Group

Warn = Callable[[str], None]


def find_checkpoint(folder: str | Path, *, world: Group = SOLO, step: int | None = None, warn: Warn = print) -> Path:
    """The checkpoint that `latest` names if every byte of it is right, else the newest valid one, with a warning.

    With `step`, that checkpoint or an error. `folder` may also be one checkpoint's own folder. The ranks of `world`
    share the hashing and agree on the outcome; `warn` is called on its first rank.

    Communicates: two all-gathers of small objects over `world` for each checkpoint that is looked at.
    Raises: CheckpointError, the same on every rank, if there is no valid checkpoint. Starting afresh is never decided
    here.
    """
    folder = Path(folder)
    candidates, remarks = exchange(_candidates(folder, step) if world.is_first else ([], []), world)[0]
    rejected: list[str] = list(remarks)
    for path in candidates:
        problems = _problems(path, world)
        if not problems:
            if is_bigscience(path) and world.is_first:
                warn(f"{path} is from another trainer and has no hashes: what is read cannot be verified")
            if rejected and world.is_first:
                for remark in rejected:
                    warn(remark)
                warn(f"continuing from {path}, the newest valid checkpoint")
            return path
        rejected.append(f"checkpoint {path} is damaged: {'; '.join(problems[:3])}{_more(len(problems) - 3)}")
    details = "\n".join(f"  {remark}" for remark in rejected)
    raise CheckpointError(
        f"no valid checkpoint in {folder}\n{details}{chr(10) if details else ''}"
        "  give the folder that a run saved to, or start from step 0 with --allow-fresh-start"
    )


def _candidates(folder: Path, step: int | None) -> tuple[list[Path], list[str]]:
    """Paths in the order they are tried, and what is odd about the folder."""
    if not folder.is_dir():
        return [], [f"{folder} is not a folder"]
    if (folder / layout.MANIFEST).is_file() or is_bigscience(folder):
        return [folder], []
    published = published_checkpoints(folder)
    if step is not None:
        chosen = [path for number, path in published if number == step]
        return chosen, [] if chosen else [f"there is no checkpoint of step {step}; there are {_steps(published)}"]
    if not published:
        return [], ["it holds no checkpoint"]
    newest_first = [path for _, path in published]
    latest = folder / layout.LATEST
    try:
        name = latest.read_text(encoding="utf-8").strip()
        check_file_name(name)
    except (OSError, ValueError) as error:
        return newest_first, [f"{latest} cannot be read ({error})"]
    named = folder / name
    if named not in newest_first:
        return newest_first, [f"{latest} names {name}, which is not there"]
    return [named, *(path for path in newest_first if path != named)], []


def _problems(path: Path, world: Group) -> list[str]:
    """Problems that any rank finds in its share of the files; the same list on every rank."""
    if is_bigscience(path):
        return []  # There is nothing to verify it by, which `find_checkpoint` says.
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        own = [str(error)]
    else:
        if layout.parse_step(path.name) not in (None, manifest.step):
            return [f"{path / layout.MANIFEST} is that of step {manifest.step}"]  # Every rank reads the same one.
        by_size = sorted(manifest.files, key=lambda record: record.bytes, reverse=True)
        own = verify(path, manifest, records=by_size[world.rank :: world.size])
    found = exchange(own, world)
    return list(dict.fromkeys(problem for problems in found for problem in problems))


def _steps(published: list[tuple[int, Path]]) -> str:
    return ", ".join(dict.fromkeys(str(number) for number, _ in published)) or "none"


def _more(count: int) -> str:
    return f"; and {count} more" if count > 0 else ""

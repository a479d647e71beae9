"""Which checkpoint of a folder a run continues from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint import layout
from megalm.checkpoint.bigscience import is_bigscience
from megalm.checkpoint.manifest import check_file_name, read_manifest, verify
from megalm.checkpoint.retention import published_checkpoints
from megalm.checkpoint.universal import is_universal
from megalm.errors import CheckpointError
from megalm.topology.agree import exchange
from megalm.topology.group import SOLO, Group

Warn = Callable[[str], None]
Progress = Callable[[int, int], None]
"""Called with the bytes of each block that is hashed, and those of the whole checkpoint."""


@dataclass(frozen=True)
class Verification:
    """What believing a checkpoint cost."""

    num_bytes: int
    """Of all files, hashed by all ranks together."""
    seconds: float

    def __str__(self) -> str:
        if not self.num_bytes:
            return "nothing to verify it by"
        rate = f"{1e9 * self.seconds / self.num_bytes:.2f} s a GB" if self.num_bytes > 1e7 else "too few for a rate"
        return f"hashes of {self.num_bytes / 1e6:,.1f} MB verified in {self.seconds:.2f} s, {rate}"


def find_checkpoint(
    folder: str | Path,
    *,
    world: Group = SOLO,
    step: int | None = None,
    universal: bool = False,
    warn: Warn = print,
    progress: Progress | None = None,
    verified: Callable[[Verification], None] | None = None,
) -> Path:
    """The checkpoint that `latest` names if every byte of it is right, else the newest valid one before it, with a
    warning; one of a later step, which a run that was taken back has left, if there is no other.

    With `step`, that checkpoint or an error. With `universal`, the one that `latest_universal` names, as without it
    where there is no `latest`. `folder` may also be one checkpoint's own folder. The ranks of `world` share the hashing
    and agree on the outcome; `warn` is called on its first rank, `progress` on every one, and `verified` with the cost.

    Communicates: two all-gathers of small objects over `world` for each checkpoint that is looked at.
    Raises: CheckpointError, the same on every rank, if there is no valid checkpoint. Starting afresh is never decided
    here.
    """
    folder = Path(folder)
    paths, remarks = exchange(candidates(folder, step, universal) if world.is_first else ([], []), world)[0]
    rejected: list[str] = list(remarks)
    for path in paths:
        started = time.monotonic()
        problems, num_bytes = _problems(path, world, progress)
        if not problems:
            if has_no_hashes(path) and world.is_first:
                warn(f"{path} is from another trainer and has no hashes: what is read cannot be verified")
            if rejected and world.is_first:
                for remark in rejected:
                    warn(remark)
                warn(f"continuing from {path}, the newest valid checkpoint")
            if verified is not None:
                verified(Verification(num_bytes, time.monotonic() - started))
            return path
        rejected.append(f"checkpoint {path} is damaged: {'; '.join(problems[:3])}{_more(len(problems) - 3)}")
    raise none_valid(folder, rejected)


def none_valid(folder: Path, remarks: list[str]) -> CheckpointError:
    """The error of a folder without a valid checkpoint, with what was odd about it."""
    details = "".join(f"  {remark}\n" for remark in remarks)
    return CheckpointError(f"no valid checkpoint in {folder}\n{details}  give the folder that a run saved to")


def candidates(folder: Path, step: int | None, universal: bool) -> tuple[list[Path], list[str]]:
    """The checkpoints of a folder in the order they are tried, by their names, and what is odd about it."""
    if not folder.is_dir():
        return [], [f"{folder} is not a folder"]
    foreign = is_hugging_face(folder)
    if ((folder / layout.MANIFEST).is_file() and not foreign) or is_bigscience(folder) or is_universal(folder):
        if universal and not is_universal(folder):
            return [], [f"{folder} is no universal checkpoint, as --universal-checkpoint asks"]
        if step is not None and layout.parse_step(folder.resolve().name) != step:
            return [], [f"{folder} is one checkpoint, and not that of step {step}"]
        return [folder], []
    latest = folder / layout.LATEST
    if step is None and (universal or not latest.exists()) and (folder / layout.LATEST_UNIVERSAL).is_file():
        return _named_universal(folder)
    published = [(n, path) for n, path in published_checkpoints(folder) if not universal or is_universal(path)]
    if not published and foreign:
        return [], ["it is a Hugging Face folder, of which tools/import_hf.py makes a checkpoint"]
    if step is not None:
        chosen = [path for number, path in published if number == step]
        return chosen, [] if chosen else [f"there is no checkpoint of step {step}; there are {_steps(published)}"]
    if not published:
        return [], [f"it holds no {'universal ' if universal else ''}checkpoint"]
    newest_first = [path for _, path in published]
    try:
        named = named_by(latest)
    except (OSError, ValueError) as error:
        return newest_first, [f"{latest} cannot be read ({error})"]
    if named not in newest_first:
        return newest_first, [f"{latest} names {named.name}, which is not there"]
    # Steps after the one that `latest` names are of a run that was taken back to it, or were never finished.
    last = next(number for number, path in published if path == named)
    before, after = (
        [path for n, path in published if path != named and (n > last) is later] for later in (False, True)
    )
    return [named, *before, *after], []


def _named_universal(folder: Path) -> tuple[list[Path], list[str]]:
    """The one that `latest_universal` names, by whatever name, then the other universal ones."""
    latest = folder / layout.LATEST_UNIVERSAL
    others = [path for _, path in published_checkpoints(folder) if is_universal(path)]
    try:
        named = named_by(latest)
    except (OSError, ValueError) as error:
        return others, [f"{latest} cannot be read ({error})"]
    if not is_universal(named):
        return others, [f"{latest} names {named.name}, which is no universal checkpoint"]
    return [named, *(path for path in others if path != named)], []


def named_by(latest: Path) -> Path:
    """What a file such as `latest` names.

    Raises: OSError, or ValueError for a name that leads elsewhere.
    """
    name = latest.read_text(encoding="utf-8").strip()
    check_file_name(name)
    return latest.parent / name


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder is a model for transformers; its manifest.json, if it is an export, lists other files."""
    return (folder / "config.json").is_file()


def has_no_hashes(path: Path) -> bool:
    """Whether a checkpoint is from another program, which lists no files: there is nothing to verify it by."""
    return is_bigscience(path) or (is_universal(path) and not (path / layout.MANIFEST).exists())


def _problems(path: Path, world: Group, progress: Progress | None) -> tuple[list[str], int]:
    """Problems that any rank finds in its share of the files, the same list on every rank; and the bytes of all."""
    if has_no_hashes(path):
        return [], 0  # There is nothing to verify it by, which `find_checkpoint` says.
    num_bytes = 0
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        own = [str(error)]
    else:
        if layout.parse_step(path.name) not in (None, manifest.step):
            return [f"{path / layout.MANIFEST} is that of step {manifest.step}"], 0  # Every rank reads the same one.
        num_bytes = manifest.total_bytes
        by_size = sorted(manifest.files, key=lambda record: record.bytes, reverse=True)
        count = None if progress is None else lambda count: progress(count, num_bytes)
        own = verify(path, manifest, records=by_size[world.rank :: world.size], progress=count)
    found = exchange(own, world)
    return list(dict.fromkeys(problem for problems in found for problem in problems)), num_bytes


def _steps(published: list[tuple[int, Path]]) -> str:
    return ", ".join(dict.fromkeys(str(number) for number, _ in published)) or "none"


def _more(count: int) -> str:
    return f"; and {count} more" if count > 0 else ""

"""Which checkpoint of a folder a run continues from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megalm.checkpoint import layout
from megalm.checkpoint.bigscience import is_bigscience
from megalm.checkpoint.history import own_checkpoints, read_lineages, read_tip
from megalm.checkpoint.lineage import attempt_at
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
class Candidates:
    """The checkpoints of a folder in the order they are tried, by their small files, and what is odd about it."""

    paths: list[Path]
    remarks: list[str]
    left_behind: list[Path] = field(default_factory=list)
    """What comes after `paths`: checkpoints that the run did not come by, as it was taken back."""


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
    """The checkpoint that `latest` names if every byte of it is right, else the newest valid one that its run came by,
    with a warning; one that a run has left behind when it was taken back, if there is no other.

    With `step`, that checkpoint or an error. With `universal`, the one that `latest_universal` names, as without it
    where there is no `latest`. `folder` may also be one checkpoint's own folder. The ranks of `world` share the hashing
    and agree on the outcome; `warn` is called on its first rank, `progress` on every one, and `verified` with the cost.

    Communicates: an all-gather of small objects over `world`, and one more for each checkpoint that is looked at.
    Raises: CheckpointError, the same on every rank, if there is no valid checkpoint. Starting afresh is never decided
    here.
    """
    folder = Path(folder)
    found = exchange(candidates(folder, step, universal) if world.is_first else Candidates([], []), world)[0]
    rejected: list[str] = list(found.remarks)
    for path in [*found.paths, *found.left_behind]:
        started = time.monotonic()
        problems, num_bytes = _problems(path, world, progress)
        if not problems:
            if has_no_hashes(path) and world.is_first:
                warn(f"{path} is from another trainer and has no hashes: what is read cannot be verified")
            if rejected and world.is_first:
                for remark in rejected:
                    warn(remark)
                which = "the newest valid checkpoint"
                if path in found.left_behind:
                    which = "of steps that the run had left behind: none that it came by is valid"
                warn(f"continuing from {path}, {which}")
            if verified is not None:
                verified(Verification(num_bytes, time.monotonic() - started))
            return path
        rejected.append(f"checkpoint {path} is damaged: {'; '.join(problems[:3])}{_more(len(problems) - 3)}")
    raise none_valid(folder, rejected)


def none_valid(folder: Path, remarks: list[str]) -> CheckpointError:
    """The error of a folder without a valid checkpoint, with what was odd about it."""
    details = "".join(f"  {remark}\n" for remark in remarks)
    return CheckpointError(f"no valid checkpoint in {folder}\n{details}  give the folder that a run saved to")


def candidates(folder: Path, step: int | None, universal: bool) -> Candidates:
    """Which checkpoints of a folder are tried; reads of each its smallest file."""
    if not folder.is_dir():
        return Candidates([], [f"{folder} is not a folder"])
    foreign = is_hugging_face(folder)
    if ((folder / layout.MANIFEST).is_file() and not foreign) or is_bigscience(folder) or is_universal(folder):
        if universal and not is_universal(folder):
            return Candidates([], [f"{folder} is no universal checkpoint, as --universal-checkpoint asks"])
        if step is not None and layout.parse_step(folder.resolve().name) != step:
            return Candidates([], [f"{folder} is one checkpoint, and not that of step {step}"])
        return Candidates([folder], [])
    latest = folder / layout.LATEST
    if step is None and (universal or not latest.exists()) and (folder / layout.LATEST_UNIVERSAL).is_file():
        return _named_universal(folder)
    published = [(n, path) for n, path in published_checkpoints(folder) if not universal or is_universal(path)]
    if not published and foreign:
        return Candidates([], ["it is a Hugging Face folder, of which tools/import_hf.py makes a checkpoint"])
    if step is not None:
        chosen = [path for number, path in published if number == step]
        return Candidates(
            chosen, [] if chosen else [f"there is no checkpoint of step {step}; there are {_steps(published)}"]
        )
    if not published:
        return Candidates([], [f"it holds no {'universal ' if universal else ''}checkpoint"])
    try:
        named = named_by(latest)
    except (OSError, ValueError) as error:
        return _from(_newest(published), published, [f"{latest} cannot be read ({error})"])
    if not any(path == named for _, path in published):
        return _from(_newest(published), published, [f"{latest} names {named.name}, which is not there"])
    return _from(named, published, [])


def _newest(published: list[tuple[int, Path]]) -> Path:
    """The highest step of the attempt that began last: what is most likely to be the newest, where nothing says so."""
    lineages = read_lineages([path for _, path in published])
    attempts = [attempt_at(lineage, step) for lineage, (step, _) in zip(lineages, published, strict=True)]
    return published[attempts.index(max(attempts))][1]


def _from(newest: Path, published: list[tuple[int, Path]], remarks: list[str]) -> Candidates:
    """The newest one of a run, those that it came by, and the rest, earlier steps than its own first."""
    last = next(number for number, path in published if path == newest)
    own = own_checkpoints(read_tip(newest, step=last), [entry for entry in published if entry[1] != newest])
    rest = [entry for entry in published if entry[1] not in (newest, *own)]
    return Candidates(
        [newest, *own], remarks, left_behind=[path for _, path in sorted(rest, key=lambda entry: entry[0] > last)]
    )


def _named_universal(folder: Path) -> Candidates:
    """The one that `latest_universal` names, by whatever name, then the other universal ones."""
    latest = folder / layout.LATEST_UNIVERSAL
    others = [path for _, path in published_checkpoints(folder) if is_universal(path)]
    try:
        named = named_by(latest)
    except (OSError, ValueError) as error:
        return Candidates(others, [f"{latest} cannot be read ({error})"])
    if not is_universal(named):
        return Candidates(others, [f"{latest} names {named.name}, which is no universal checkpoint"])
    return Candidates([named, *(path for path in others if path != named)], [])


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
    """Problems that any rank finds in its share of the files, the same list on every rank; and the bytes of all.

    What a rank sees of the folder may differ from host to host, so nothing of it decides whether ranks communicate.
    """
    found = exchange(_own_problems(path, world, progress), world)
    return list(dict.fromkeys(problem for problems, _ in found for problem in problems)), max(size for _, size in found)


def _own_problems(path: Path, world: Group, progress: Progress | None) -> tuple[list[str], int]:
    if has_no_hashes(path):
        return [], 0  # There is nothing to verify it by, which `find_checkpoint` says.
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)], 0
    if layout.parse_step(path.name) not in (None, manifest.step):
        return [f"{path / layout.MANIFEST} is that of step {manifest.step}"], 0
    num_bytes = manifest.total_bytes
    by_size = sorted(manifest.files, key=lambda record: record.bytes, reverse=True)
    count = None if progress is None else lambda count: progress(count, num_bytes)
    return verify(path, manifest, records=by_size[world.rank :: world.size], progress=count), num_bytes


def _steps(published: list[tuple[int, Path]]) -> str:
    return ", ".join(dict.fromkeys(str(number) for number, _ in published)) or "none"


def _more(count: int) -> str:
    return f"; and {count} more" if count > 0 else ""

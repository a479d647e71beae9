"""What a run must share with the checkpoint that it continues from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint.history import read_tip
from megalm.checkpoint.identity import read_config
from megalm.checkpoint.layout import ROLL_BACKS
from megalm.checkpoint.lineage import Lineage, Tip, new_attempt
from megalm.checkpoint.manifest import read_manifest
from megalm.checkpoint.retention import published_checkpoints
from megalm.checkpoint.roll_backs import RollBack, parse_roll_backs
from megalm.checkpoint.taking_back import read_roll_backs, set_aside_roll_backs
from megalm.config.compare import Difference, differences
from megalm.config.root import Config
from megalm.data.folder_lock import folder_lock
from megalm.errors import CheckpointError, ConfigError, listed
from megalm.topology.agree import of_first
from megalm.topology.topology import Topology

LOCK = ".run.lock"
"""Not the `.lock` of sample maps, which --data-cache-path may put into the same folder."""
PATIENCE_SECONDS = 10.0
"""A run that was told to stop may still be writing its last checkpoint."""


def or_afresh(error: CheckpointError) -> CheckpointError:
    """The error of a run that finds no checkpoint, with the way on that a run has and a tool has not."""
    return CheckpointError(f"{error}, or start from step 0 with --allow-fresh-start")


def check_save_folder(config: Config, loaded: Path | None) -> None:
    """Whether all checkpoints in `--save` are of this run, which starts from `loaded`, or from nothing.

    Raises: CheckpointError if there are others: the run would replace them step by step, remove them in place of its
        own, and go on from one of them if its own were damaged.
    """
    output, folder = config.output, _saved_to(config)
    if folder is None:
        return
    resets = output.finetune or output.reset_progress
    if _is_in(folder, config, loaded) and not (resets and loaded is not None):
        return
    others: list[Path] = []
    with contextlib.suppress(OSError):  # Of a folder that is not there or cannot be read whoever writes to it tells.
        others = [
            path
            for step, path in published_checkpoints(folder)
            if loaded is None or step > 0 or not _same(path, loaded)
        ]
    if others:
        named = listed([path.name for path in others], 3)
        start = "counts from step 0" if resets or loaded is None else f"goes on from {loaded}"
        remedy = "" if resets else f"--load {folder} goes on from them; for another run "
        raise CheckpointError(
            f"{folder} holds checkpoints of another run than this one, which {start}: {named}\n"
            f"  {remedy}give another --save, or move them away"
        )


@contextlib.contextmanager
def only_saver(config: Config, topology: Topology) -> Iterator[None]:
    """Keep `--save` to this run for the duration, where the file system has locks; a process that dies lets go of it.

    Communicates: one all-gather of small objects over the world.
    Raises: CheckpointError, the same on every rank, if another run saves to it for longer than `PATIENCE_SECONDS`.
    """
    output, folder = config.output, _saved_to(config)
    if folder is None:
        yield
        return
    with contextlib.ExitStack() as held:

        def hold() -> None:
            if output.load is not None and not output.allow_fresh_start and not folder.exists():
                load = Path(output.load)
                if _same(load, folder) or _same(load.parent, folder):  # There is nothing to load, and so no run.
                    return
            # What else is wrong with the folder whoever writes to it says.
            with contextlib.suppress(OSError):
                lock = folder_lock(folder, name=LOCK, is_ours=True, patience_seconds=PATIENCE_SECONDS)
                if held.enter_context(lock) is False:
                    raise CheckpointError(
                        f"another run is saving to {folder}, and has been for {PATIENCE_SECONDS:.0f} s\n"
                        "  wait for its end, or give another --save"
                    )

        of_first(topology, hold)
        yield


def _saved_to(config: Config) -> Path | None:
    """The folder that the run saves to; None for one that does not save."""
    save = config.output.save
    return None if save is None or config.training.eval_only else Path(save)


def lies_in(checkpoint: Path, folder: Path) -> bool:
    """Whether a checkpoint is one of those in `folder`, however both are spelled or linked."""
    return _same(checkpoint.parent, folder) or _same(checkpoint.resolve().parent, folder)


def _is_in(folder: Path, config: Config, loaded: Path | None) -> bool:
    """Whether a run that saves to `folder` found what it starts from there."""
    if loaded is None:  # All that --load holds may be damaged.
        return config.output.load is not None and _same(folder, Path(config.output.load))
    return lies_in(loaded, folder)


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


@dataclass(frozen=True)
class Onward:
    """What a run is to the checkpoints that lie in `--save`."""

    lineage: Lineage = ()
    """That of what it saves."""
    later: tuple[str, ...] = ()
    """Steps after the one that it goes on from, which it leaves behind."""
    begins: str | None = None
    """The attempt that begins with it, if it goes on from another step than the newest of its lineage."""

    def __str__(self) -> str:
        return (
            f"later steps than the one gone on from: {listed(self.later, 5)}; this run replaces those that "
            "it saves too, and leaves the others behind: they stay, and --keep-last and --load pass over them"
        )


def onward(config: Config, loaded: Path | None, tip: Tip) -> Onward:
    """How a run goes on from the checkpoint `loaded`, which is `tip`; None of all that lie there if none is valid.

    Reads the lineages of later steps.
    """
    output, folder = config.output, _saved_to(config)
    if output.finetune or output.reset_progress:
        return Onward()  # It counts its own steps.
    lineage = tip.lineage or ()
    if folder is None or (loaded is not None and not lies_in(loaded, folder)):
        return Onward(lineage)
    later: list[tuple[int, Path]] = []
    with contextlib.suppress(OSError):  # Of a folder that is not there or cannot be read whoever writes to it tells.
        later = [(step, path) for step, path in published_checkpoints(folder) if loaded is None or step > tip.step]
    names = tuple(path.name for _, path in later)
    # One whose lineage cannot be read may be of this one.
    tips = (read_tip(path, step=step) for step, path in later)
    if loaded is not None and not any(after.has_behind(tip.step, lineage) for after in tips):
        return Onward(lineage, names)
    if not later:
        return Onward(lineage)
    attempt = new_attempt()
    return Onward((*lineage, (attempt, 0 if loaded is None else tip.step + 1)), names, begins=attempt)


def roll_backs(
    config: Config, loaded: Path | None, *, stored: object, step: int, warn: Callable[[str], None]
) -> tuple[RollBack, ...]:
    """What a run leaves out that goes on at `step` from the checkpoint `loaded`, which has `stored`: that, and what the
    folder says of later steps.

    Raises: CheckpointError if the run would go on with parameters that it was taken back from, unless the checkpoint is
        named itself, or if what is stored cannot be read.
    """
    output = config.output
    if output.load is None or output.finetune or output.reset_progress:
        return ()
    try:
        own = parse_roll_backs(stored)
    except ValueError as error:
        raise CheckpointError(
            f"{loaded}: train_state.json is damaged, {error}\n  load an earlier checkpoint"
        ) from error
    folder = Path(output.load) if loaded is None else loaded.parent
    others = [entry for entry in read_roll_backs(folder) if entry not in own]
    trained = [entry for entry in others if entry.first <= step]
    if trained and loaded is not None:
        said = f"{loaded} is trained on steps that its run was taken back from: {'; '.join(map(str, trained))}"
        if not _same(loaded, Path(output.load)):
            raise CheckpointError(
                f"the newest valid checkpoint, {said}\n"
                f"  go on from an earlier checkpoint, or from this one all the same with --load {loaded}"
            )
        warn(f"{said}\n  --load {folder} refuses what is trained on them until {folder / ROLL_BACKS} has them no more")
    return (*own, *(entry for entry in others if entry not in trained))


def left_out_ahead(config: Config, known: Sequence[RollBack], *, step: int) -> list[str]:
    """A line for each stretch of steps after `step` that the run leaves out; none where it trains on nothing."""
    ahead = () if config.training.eval_only else known
    return [f"left out are {roll_back}" for roll_back in ahead if roll_back.last > step]


def forget_roll_backs(config: Config, loaded: Path | None) -> Path | None:
    """Where the file went of what another run left out in `--save`; none if there was none, or it is this run's.

    `check_save_folder` has found no checkpoints of that run.
    Raises: CheckpointError if it cannot be renamed.
    """
    output, folder = config.output, _saved_to(config)
    resets = output.finetune or output.reset_progress
    if folder is None or (_is_in(folder, config, loaded) and not resets):
        return None
    return set_aside_roll_backs(folder)


def compare(
    config: Config, path: Path, *, dp_size: int, info: Callable[[str], None], warn: Callable[[str], None]
) -> list[Difference]:
    """Tell what differs from the configuration that the checkpoint was saved with, and return it; the global batch,
    too, where it is that of the replicas, which are `dp_size` now.

    Raises: ConfigError if the learning rate would follow another course and nobody asked for that.
    """
    output = config.output
    stored = read_config(path)
    if stored is None:
        if not output.finetune:
            warn(f"{path} does not say how it was trained: the schedule of this run is followed")
        return []
    found = [*differences(stored, config), *_other_batch(stored, config, path, dp_size=dp_size)]
    for difference in found:
        info(f"changed since {path.name}: {difference}")
    changed = [difference for difference in found if difference.changes_schedule]
    may_change = output.override_lr_schedule or output.finetune or output.reset_progress or config.training.eval_only
    if changed and not may_change:
        lines = "\n".join(f"  {difference}" for difference in changed)
        raise ConfigError(
            f"the learning rate would not follow the schedule that {path} was trained with\n{lines}\n"
            "  give the stored values (a longer run keeps its schedule with --lr-decay-iters or "
            "--lr-decay-samples), or pass --override-lr-scheduler"
        )
    return found


def _other_batch(stored: Config, config: Config, path: Path, *, dp_size: int) -> Iterator[Difference]:
    """The global batch, if it follows from the number of replicas on both sides and differs."""
    name = "training.global_batch_size"
    if stored.training.global_batch_size is not None or config.training.global_batch_size is not None:
        return
    with contextlib.suppress(CheckpointError):  # Without a manifest nobody knows how many replicas there were.
        dp_before = read_manifest(path).layout.get("dp")
        if isinstance(dp_before, int) and dp_before > 0:
            was, now = stored.global_batch_size(dp_size=dp_before), config.global_batch_size(dp_size=dp_size)
            if was != now:
                source = f"micro_batch_size * dp, which is {dp_size}; --global-batch-size {was} keeps it"
                yield Difference(name, was, now, source, changes_model=False)

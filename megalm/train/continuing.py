"""What a run must share with the checkpoint that it continues from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megalm.checkpoint.identity import read_config
from megalm.config.compare import Difference, differences
from megalm.config.root import Config
from megalm.errors import CheckpointError, ConfigError


def or_afresh(error: CheckpointError) -> CheckpointError:
    """The error of a run that finds no checkpoint, with the way on that a run has and a tool has not."""
    return CheckpointError(f"{error}, or start from step 0 with --allow-fresh-start")


def compare(
    config: Config, path: Path, *, info: Callable[[str], None], warn: Callable[[str], None]
) -> list[Difference]:
    """Tell what differs from the configuration that the checkpoint was saved with, and return it.

    Raises: ConfigError if the learning rate would follow another course and nobody asked for that.
    """
    output = config.output
    stored = read_config(path)
    if stored is None:
        if not output.finetune:
            warn(f"{path} does not say how it was trained: the schedule of this run is followed")
        return []
    found = differences(stored, config)
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

"""When a checkpoint is written, and the way back from one. How is `megalm/checkpoint`'s affair."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint.find import find_checkpoint
from megalm.checkpoint.identity import read_config
from megalm.checkpoint.load import load_checkpoint
from megalm.checkpoint.save import save_checkpoint
from megalm.config.compare import differences
from megalm.config.output import OutputConfig
from megalm.config.root import Config
from megalm.errors import CheckpointError, ConfigError
from megalm.parallel.random import RngStreams
from megalm.telemetry.console import Console
from megalm.topology.topology import Topology
from megalm.train.engine import Engine
from megalm.train.state import TrainState


@dataclass
class Saver:
    """Writes this run's checkpoints; without a folder to save in, it keeps nothing."""

    config: Config
    topology: Topology
    engine: Engine
    streams: RngStreams
    console: Console
    saved_step: int = -1

    def save(self, state: TrainState) -> None:
        """Publish a checkpoint of this step.

        Raises: CheckpointError, the same on every rank, if any rank cannot write its part.
        """
        if self.config.output.save is None:
            return
        report = save_checkpoint(
            self.engine.raw,
            self.config.output.save,
            state.to_json(),
            config=self.config,
            topology=self.topology,
            rng=self.streams.state_dict(),
            keep_last=self.config.output.keep_last,
        )
        self.saved_step = state.step
        megabytes = report.num_bytes / 1e6
        self.console.info(f"saved {report.path} ({megabytes:.1f} MB in {report.elapsed_seconds:.1f} s)")
        for problem in report.problems:
            self.console.warning(problem)

    def save_if_newer(self, state: TrainState) -> None:
        """Save unless this very step is already on disk."""
        if state.step > self.saved_step:
            self.save(state)

    def restore(self) -> TrainState:
        """The state to continue from: that of the checkpoint in `--load`, or step 0 without one.

        Raises: CheckpointError, the same on every rank, if the folder holds no valid checkpoint, unless
        --allow-fresh-start was given.
        """
        output = self.config.output
        if output.load is None:
            return TrainState()
        try:
            path = find_checkpoint(output.load, world=self.topology.world, warn=self.console.warning)
        except CheckpointError as error:
            if not output.allow_fresh_start:
                raise
            self.console.warning(f"{error}\n  --allow-fresh-start was given: starting from step 0")
            return TrainState()
        self._compare(path)
        loaded = load_checkpoint(
            self.engine.raw,
            path,
            config=self.config,
            topology=self.topology,
            load_optimizer=output.load_optim and not output.finetune,
            weights_only=output.finetune,
        )
        if loaded.rng is not None and output.load_rng and not output.finetune:
            self.streams.load_state_dict(loaded.rng)
        state = _progress(loaded.state, output)
        self.saved_step = state.step if output.save is not None and output.save == output.load else -1
        self.console.info(f"continuing from {path}: step {state.step}, {state.consumed_samples} samples consumed")
        return state

    def _compare(self, path: Path) -> None:
        """Log what differs from the configuration that the checkpoint was saved with.

        Raises: ConfigError if the learning rate would follow another course and nobody asked for that.
        """
        output = self.config.output
        stored = read_config(path)
        if stored is None:
            self.console.warning(f"{path} does not say how it was trained: the schedule of this run is followed")
            return
        found = differences(stored, self.config)
        for difference in found:
            self.console.info(f"changed since {path.name}: {difference}")
        changed = [difference for difference in found if difference.changes_schedule]
        if changed and not (output.override_lr_schedule or output.finetune or output.reset_progress):
            lines = "\n".join(f"  {difference}" for difference in changed)
            raise ConfigError(
                f"the learning rate would not follow the schedule that {path} was trained with\n{lines}\n"
                "  give the stored values (a longer run keeps its schedule with --lr-decay-iters or "
                "--lr-decay-samples), or pass --override-lr-scheduler"
            )


def _progress(stored: dict[str, object], output: OutputConfig) -> TrainState:
    """How far the run counts as being: --finetune and --reset-progress begin at 0 with what was loaded."""
    state = TrainState.from_json(stored)
    return TrainState() if output.finetune or output.reset_progress else state

"""When a checkpoint is written, and the way back from one. How is `megalm/checkpoint`'s affair."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megalm.checkpoint.background import BackgroundSaver
from megalm.checkpoint.find import Verification, find_checkpoint
from megalm.checkpoint.layout import parse_step
from megalm.checkpoint.lineage import KEY as LINEAGE
from megalm.checkpoint.lineage import Lineage, Tip, lineage_in
from megalm.checkpoint.load import load_checkpoint
from megalm.checkpoint.roll_backs import KEY as ROLL_BACKS
from megalm.checkpoint.roll_backs import SPIKE_WATCH, RollBack, to_json
from megalm.checkpoint.save import SaveReport, save_checkpoint
from megalm.checkpoint.taking_back import newest_before, take_back
from megalm.config.compare import Difference
from megalm.config.output import OutputConfig
from megalm.config.root import Config
from megalm.errors import CheckpointError, ConfigError
from megalm.parallel.random import RngStreams
from megalm.telemetry.console import Console
from megalm.topology.agree import exchange, of_first, together
from megalm.topology.topology import Topology
from megalm.train.continuing import (
    check_save_folder,
    compare,
    forget_roll_backs,
    left_out_ahead,
    lies_in,
    onward,
    or_afresh,
    roll_backs,
)
from megalm.train.engine import Engine
from megalm.train.spikes import SpikeWatch
from megalm.train.state import TrainState

SAMPLE_ORDER = "sample_order"
"""Key of train_state.json."""


@dataclass
class Saver:
    """Writes this run's checkpoints, at once or in the background; without a folder to save in, it keeps nothing.

    Every method but the constructor is collective: all ranks call it at the same step boundary, and a failure on one
    rank is the same CheckpointError on all.
    """

    config: Config
    topology: Topology
    engine: Engine
    streams: RngStreams
    console: Console
    sample_order: str | None = None
    """`order_digest` of the training samples."""
    spikes: SpikeWatch | None = None
    saved_step: int = -1
    """Step of the newest checkpoint that this run has published or begun to write."""
    published_step: int = -1
    """Step of the newest one that is on disk."""
    lineage: Lineage = ()
    """Of what this run saves."""
    roll_backs: tuple[RollBack, ...] = ()
    """What the run leaves out since its loss rose, or has left out."""
    background: BackgroundSaver = field(init=False)

    def __post_init__(self) -> None:
        output = self.config.output
        self.background = BackgroundSaver(self.topology, keep_last=output.keep_last, keep_every=output.keep_every)

    def save(self, state: TrainState) -> None:
        """Publish a checkpoint of this step, or with --async-save begin to.

        Raises: CheckpointError if any rank cannot write its part, unless --on-save-failure continue.
        """
        with self._failing_as_configured():
            if self.config.output.async_save:
                self._begin(state)
            else:
                self._write(state)

    def poll(self) -> None:
        """Notice that a checkpoint in the background is published, or has failed; called after every step.

        Raises: CheckpointError if it failed, unless --on-save-failure continue.
        """
        with self._failing_as_configured():
            self._report(self.background.poll())

    def finish(self) -> None:
        """Wait for a checkpoint in flight, if there is one: nothing comes after it.

        Raises: CheckpointError if it failed, unless --on-save-failure continue.
        """
        with self._failing_as_configured():
            self._report(self.background.finish())

    def save_last(self, state: TrainState) -> None:
        """Wait for a checkpoint in flight, and save this step unless it is on disk already.

        Raises: CheckpointError if this step is not on disk in the end.
        """
        try:
            self._report(self.background.finish())
        except CheckpointError as error:
            self.saved_step = -1
            self.console.error(f"{error}\n  trying once more")
        if state.step > self.saved_step:
            self._write(state)

    def take_back(self, state: TrainState, wanted: RollBack) -> tuple[Path, RollBack] | None:
        """Have the next start go on from before a spike, as `take_back` of `checkpoint/taking_back.py` does.

        No save may be in flight: it would point `latest` to itself.
        Raises: CheckpointError if that cannot be written down.
        """
        folder = self.config.output.save
        assert folder is not None, "the watch needs --save"
        return of_first(self.topology, partial(take_back, Path(folder), Tip(state.step, self.lineage), wanted))

    def newest_before(self, state: TrainState, wanted: RollBack) -> Path | None:
        """The checkpoint that `take_back` would go back to."""
        folder = self.config.output.save
        assert folder is not None, "the watch needs --save"
        return of_first(self.topology, partial(newest_before, Path(folder), Tip(state.step, self.lineage), wanted))

    def _write(self, state: TrainState) -> None:
        output = self.config.output
        if output.save is None:
            return
        report = save_checkpoint(
            self.engine.raw,
            output.save,
            self._state(state),
            config=self.config,
            topology=self.topology,
            rng=self.streams.state_dict(),
            keep_last=output.keep_last,
            keep_every=output.keep_every,
        )
        self.saved_step = state.step
        self._report(report)

    def _begin(self, state: TrainState) -> None:
        if self.config.output.save is None:
            return
        earlier = self.background.start(
            self.engine.raw,
            self.config.output.save,
            self._state(state),
            config=self.config,
            rng=self.streams.state_dict(),
        )
        self._report(earlier)
        self.saved_step = state.step

    def _report(self, report: SaveReport | None) -> None:
        if report is None:
            return
        step = parse_step(report.path.name)
        assert step is not None, report.path
        self.published_step = step
        megabytes, seconds = report.num_bytes / 1e6, report.elapsed_seconds
        stall = f", training waited {report.stall_seconds:.2f} s" if self.config.output.async_save else ""
        self.console.info(f"saved {report.path} ({megabytes:.1f} MB in {seconds:.1f} s{stall})")
        for problem in report.problems:
            self.console.warning(problem)

    @contextlib.contextmanager
    def _failing_as_configured(self) -> Iterator[None]:
        """Let a failed save end the run, or say it loudly and go on with the checkpoints that there are."""
        try:
            yield
        except CheckpointError as error:
            if self.config.output.on_save_failure == "stop":
                raise
            self.saved_step = -1
            self.console.error(f"{error}\n  training goes on, as --on-save-failure continue asks")

    def restore(self) -> TrainState:
        """The state to continue from: that of the checkpoint in `--load`, or step 0 without one.

        Raises: CheckpointError, the same on every rank, if the folder holds no valid checkpoint, unless
        --allow-fresh-start was given, or if `--save` holds another run's.
        """
        output = self.config.output
        if output.load is None:
            self._forget_roll_backs(None)
            return TrainState()
        costs: list[Verification] = []
        try:
            path = find_checkpoint(
                output.load,
                world=self.topology.world,
                universal=output.universal_checkpoint,
                warn=self.console.warning,
                verified=costs.append,
            )
        except CheckpointError as error:
            if not output.allow_fresh_start:
                raise or_afresh(error) from error
            self._check_save_folder(None)
            self.console.warning(f"{error}\n  --allow-fresh-start was given: starting from step 0")
            self._leave_out(None, None, step=0)
            self._go_on(None, Tip(0, None))
            return TrainState()
        self._check_save_folder(path)
        changed = together(
            self.topology,
            partial(
                compare,
                self.config,
                path,
                dp_size=self.topology.dp.size,
                info=self.console.info,
                warn=self.console.warning,
            ),
        )
        started = time.monotonic()
        loaded = load_checkpoint(
            self.engine.raw,
            path,
            config=self.config,
            topology=self.topology,
            load_optimizer=output.load_optim and not output.finetune,
            weights_only=output.finetune,
        )
        self._warn_of_drift(path, loaded.drift)
        if loaded.rng is not None and output.load_rng and not output.finetune:
            self.streams.load_state_dict(loaded.rng)
        state = _progress(loaded.state, output)
        if state.consumed_samples > 0:
            self._compare_order(path, loaded.state.get(SAMPLE_ORDER), changed)
        self.saved_step = -1
        if output.save is not None and lies_in(path, Path(output.save)):
            self.saved_step = self.published_step = state.step
        self._leave_out(path, loaded.state.get(ROLL_BACKS), step=state.step)
        if self.spikes is not None and state.step > 0:
            self.spikes.resume(loaded.state.get(SPIKE_WATCH))
        self._go_on(path, Tip(state.step, lineage_in(loaded.state)))
        self.console.info(
            f"continuing from {path}: step {state.step}, {state.consumed_samples} samples consumed; {costs[-1]}, "
            f"loaded in {time.monotonic() - started:.2f} s"
        )
        return state

    def _warn_of_drift(self, path: Path, drift: dict[str, float]) -> None:
        """Tell that tensor ranks had different copies of what they hold alike.

        Communicates: one all-gather of small objects over the world.
        """
        found = {name: size for drifts in exchange(drift, self.topology.world) for name, size in drifts.items()}
        if found:
            most = max(found, key=lambda name: found[name])
            self.console.warning(
                f"{path} has different copies of {len(found)} weight{'s' if len(found) > 1 else ''} that tensor ranks "
                f"should hold alike, {most} by {found[most]:.1e} from their mean; the means were loaded"
            )

    def _leave_out(self, path: Path | None, stored: object, *, step: int) -> None:
        """Warn of steps that are left out because the run was taken back.

        Communicates: two all-gathers of small objects over the world.
        Raises: CheckpointError, as `roll_backs` and `forget_roll_backs` do.
        """
        self._forget_roll_backs(path)
        self.roll_backs = of_first(
            self.topology, partial(roll_backs, self.config, path, stored=stored, step=step, warn=self.console.warning)
        )
        for line in left_out_ahead(self.config, self.roll_backs, step=step):
            self.console.warning(line)

    def _forget_roll_backs(self, loaded: Path | None) -> None:
        aside = of_first(self.topology, partial(forget_roll_backs, self.config, loaded))
        if aside is not None:
            self.console.warning(
                f"{self.config.output.save} says what another run left out, which has no checkpoints there: that is in "
                f"{aside.name} now"
            )

    def _go_on(self, path: Path | None, tip: Tip) -> None:
        """Warn of checkpoints that lie ahead: this run was taken back, or what was newest is damaged.

        Communicates: one all-gather of small objects over the world.
        """
        found = of_first(self.topology, partial(onward, self.config, path, tip))
        self.lineage = found.lineage
        if found.later:
            self.console.warning(f"{self.config.output.save} holds {found}")
        if found.begins is not None:
            self.console.info(f"attempt {found.begins} begins at step {tip.step + 1}")

    def _check_save_folder(self, loaded: Path | None) -> None:
        together(self.topology, partial(check_save_folder, self.config, loaded))

    def _state(self, state: TrainState) -> dict[str, object]:
        """What train_state.json holds."""
        order = {} if self.sample_order is None else {SAMPLE_ORDER: self.sample_order}
        spikes = {} if self.spikes is None else {SPIKE_WATCH: self.spikes.to_json()}
        return {**state.to_json(), **order, **spikes, LINEAGE: self.lineage, ROLL_BACKS: to_json(self.roll_backs)}

    def _compare_order(self, path: Path, stored: object, changed: list[Difference]) -> None:
        """Raises: ConfigError if the samples would come in another order than before and nobody asked for that."""
        if stored is None or self.sample_order is None or stored == self.sample_order:
            return
        what = f"the samples come in another order than {path} was trained with: some are read again, others never"
        if self.config.data.allow_changed_order:
            self.console.warning(f"{what}\n  --allow-changed-sample-order was given")
            return
        causes = [str(difference) for difference in changed if difference.changes_order]
        lines = "\n  ".join(causes or ["the corpora do not have the documents that they had"])
        raise ConfigError(
            f"{what}\n  {lines}\n"
            "  the order depends on corpora, weights, split, seed and length, and on how often the samples that the "
            "whole run asks for pass through a corpus\n"
            "  give the stored values, or pass --allow-changed-sample-order"
        )


def _progress(stored: dict[str, object], output: OutputConfig) -> TrainState:
    """How far the run counts as being: --finetune and --reset-progress begin at 0 with what was loaded."""
    state = TrainState.from_json(stored)
    return TrainState() if output.finetune or output.reset_progress else state

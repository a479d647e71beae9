"""The training loop: step, log, evaluate, save, stop, in this order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from megalm.checkpoint.roll_backs import RollBack, in_a_row
from megalm.config.root import Config
from megalm.config.step_ranges import parse_step_ranges
from megalm.data.batches import Batch
from megalm.data.loader import TimedBatches
from megalm.errors import CheckpointError, DivergedError, LossSpikeError
from megalm.telemetry.console import Console
from megalm.telemetry.memory import peak_memory_bytes
from megalm.telemetry.metrics import Sink, StepMetrics
from megalm.telemetry.profile import StepProfiler
from megalm.topology.topology import Topology
from megalm.train.compile import STEPS_TO_COMPILE, CompileWatch
from megalm.train.engine import Engine
from megalm.train.evaluation import Evaluator
from megalm.train.replica_check import ReplicaCheck
from megalm.train.saver import Saver
from megalm.train.schedule import BatchSize, LearningRate
from megalm.train.sinks import draw_curve
from megalm.train.spikes import SpikeWatch
from megalm.train.state import LeftOut, TrainState
from megalm.train.stop import EXIT_ASKED_TO_STOP, EXIT_FINISHED, StopReason, StopRequest
from megalm.train.stragglers import Stragglers
from megalm.train.watchdog import Watchdog

SPEED_WINDOW_STEPS = 20
"""Steps over which speed and time left are averaged."""


@dataclass
class Run:
    """A run, wired: everything the loop touches. `train/build.py` makes it."""

    config: Config
    topology: Topology
    engine: Engine
    state: TrainState
    batch_size: BatchSize
    learning_rate: LearningRate
    batches: Iterator[Batch]
    batches_from: Callable[[int], Iterator[Batch]]
    """This rank's batches after so many samples."""
    validation: Evaluator
    test: Evaluator
    total_steps: int
    """Steps of the whole run, those before a resume included."""
    saver: Saver
    stop: StopRequest
    console: Console
    sinks: Sequence[Sink]
    watchdog: Watchdog
    replicas: ReplicaCheck
    stragglers: Stragglers
    spikes: SpikeWatch | None
    """Of the loss; none if nobody asked for it."""
    profiler: StepProfiler
    compile_watch: CompileWatch
    flops_per_token: float
    skipped_in_a_row: int = 0
    """Updates that were left out, up to the last step."""
    steps_here: int = 0
    """Steps since this process started."""
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=SPEED_WINDOW_STEPS))
    """Seconds and tokens of the last steps."""

    @property
    def is_complete(self) -> bool:
        """Whether the training that was asked for is done."""
        training = self.config.training
        if training.train_samples is not None:
            return self.state.consumed_samples >= training.train_samples
        return self.state.step >= (training.train_iters or 0)

    def is_left_out(self, step: int) -> bool:
        """Whether --skip-train-iteration-range names this step, counted from 1, or the run was taken back over it."""
        named = parse_step_ranges(self.config.training.skip_train_iteration_range)
        return any(step in steps for steps in named) or any(
            roll_back.first <= step <= roll_back.last for roll_back in self.saver.roll_backs
        )


def train(run: Run) -> int:
    """Train until the run is complete or somebody asks it to stop; what was trained is saved in either case.

    Returns the exit code of the program. Raises: CheckpointError if a checkpoint cannot be written; DivergedError,
    ReplicaError and LossSpikeError, as `stop_if_diverged`, `stop_if_drifted` and `go_back_if_loss_rose` do.
    """
    first = run.state.step
    run.stop.listen()
    run.watchdog.at("agreeing on whether to go on", first)
    reason = run.stop.agree(None, run.topology)
    while not run.is_complete and reason is StopReason.NONE:
        if skip(run):
            reason = run.stop.agree(run.state.step, run.topology)
            continue
        try:
            metrics = step(run)
        except DivergedError:
            _finish_last_save(run)
            raise
        for sink in run.sinks:
            sink.log_step(metrics)
        for line in run.stragglers.look(metrics.step, num_samples=metrics.global_batch_size or 1):
            run.console.warning(line)
        stop_if_diverged(run, metrics)
        saves = _is_due(run.state, run.config.output.save_interval)
        if saves or run.replicas.is_due(run.state.step):
            stop_if_drifted(run)
        go_back_if_loss_rose(run, metrics)
        if _is_due(run.state, run.config.training.eval_interval) or run.is_complete:
            evaluate(run, run.validation)
        if saves:
            run.watchdog.at("saving", run.state.step)
            run.saver.save(run.state)
        run.saver.poll()
        run.watchdog.at("agreeing on whether to go on", run.state.step)
        reason = run.stop.agree(run.state.step, run.topology)
    if run.state.step > first or run.is_complete:
        stop_if_drifted(run)
        run.watchdog.at("saving", run.state.step)
        run.saver.save_last(run.state)
    unsaved = "" if run.config.output.save else "; nothing was saved, as --save names no folder"
    why = StopReason.NONE if run.is_complete else reason
    run.console.info(f"stopped after step {run.state.step}: {why.sentence}{unsaved}")
    if run.is_complete:
        evaluate(run, run.test)
    run.watchdog.at("drawing the curve", run.state.step)
    draw_curve(run.config, run.topology)
    return EXIT_FINISHED if run.is_complete else EXIT_ASKED_TO_STOP


def evaluate_once(run: Run) -> int:
    """Evaluate what was loaded on the validation and test sets, without training. Returns the exit code."""
    evaluate(run, run.validation)
    evaluate(run, run.test)
    return EXIT_FINISHED


def skip(run: Run) -> bool:
    """Pass over the steps that the run was told to leave out, if the next one is such: they count, with their samples,
    and the batches after them are those that follow in the order of samples. Returns whether there were any."""
    state = run.state
    first, first_sample = state.step + 1, state.consumed_samples
    while run.is_left_out(state.step + 1) and not run.is_complete:
        batch_size = run.batch_size.at(state.consumed_samples)
        state.step += 1
        state.consumed_samples += batch_size
    if state.step < first:
        return False
    state.left_out = (*state.left_out, LeftOut(first, state.step, first_sample, state.consumed_samples - 1))
    run.batches = run.batches_from(state.consumed_samples)
    run.console.info(f"left out steps {first} to {state.step}; {state.consumed_samples} samples consumed")
    if run.is_complete:  # No step comes after which the validation set would be evaluated a last time.
        evaluate(run, run.validation)
        if any(first <= roll_back.last for roll_back in run.saver.roll_backs):
            run.console.warning(
                "the last steps of the run were left out; a smaller --loss-spike-margin leaves out fewer"
            )
    return True


def step(run: Run) -> StepMetrics:
    """One update of the parameters, and the progress it made."""
    state = run.state
    batch_size = run.batch_size.at(state.consumed_samples)
    if run.config.training.by_samples:
        learning_rate = run.learning_rate.at(state.consumed_samples, state.consumed_samples + batch_size)
    else:
        learning_rate = run.learning_rate.at(state.step, state.step + 1)

    run.watchdog.at("training", state.step + 1)
    batches = TimedBatches(run.watchdog.batches(run.batches, "training", state.step + 1))
    waited = run.stragglers.waited_seconds
    started = time.perf_counter()
    with run.profiler.step(state.step + 1):
        result = run.engine.train_step(batches, global_batch_size=batch_size, learning_rate=learning_rate)
    step_seconds = time.perf_counter() - started
    waited = run.stragglers.waited_seconds - waited
    run.stragglers.add(step_seconds=step_seconds, waited_seconds=waited, data_seconds=batches.seconds)
    run.steps_here += 1
    run.compile_watch.report(f"step {state.step + 1}", expected=run.steps_here <= STEPS_TO_COMPILE)

    tokens = batch_size * run.config.data.seq_length
    state.step += 1
    state.consumed_samples += batch_size
    state.consumed_tokens += tokens
    state.skipped_steps += int(result.skipped)
    run.recent.append((step_seconds, tokens))
    seconds, recent_tokens = (sum(column) for column in zip(*run.recent, strict=True))
    tokens_per_second = recent_tokens / seconds
    return StepMetrics(
        step=state.step,
        total_steps=run.total_steps,
        consumed_samples=state.consumed_samples,
        consumed_tokens=state.consumed_tokens,
        loss=result.loss,
        lr=learning_rate,
        grad_norm=result.grad_norm,
        step_seconds=step_seconds,
        tokens_per_second=tokens_per_second,
        tflops=tokens_per_second * run.flops_per_token / run.topology.world.size / 1e12,
        eta_seconds=(run.total_steps - state.step) * seconds / len(run.recent),
        loss_scale=result.loss_scale,
        skipped=result.skipped,
        global_batch_size=batch_size,
        data_seconds=batches.seconds,
        peak_memory_bytes=peak_memory_bytes(run.topology.device),
    )


def stop_if_diverged(run: Run, metrics: StepMetrics) -> None:
    """Count updates in a row that were left out because gradients were not finite; fp16's loss scale has its own end,
    unless it is fixed.

    Raises: DivergedError, the same on every rank, after training.max_skipped_steps of them. Nothing is saved: what is
    on disk is from before, or holds the same parameters.
    """
    training = run.config.training
    run.skipped_in_a_row = run.skipped_in_a_row + 1 if metrics.skipped else 0
    adapts = training.dtype == "fp16" and training.loss_scale is None
    if adapts or not 0 < training.max_skipped_steps <= run.skipped_in_a_row:
        return
    _finish_last_save(run)
    first = metrics.step - run.skipped_in_a_row + 1
    lower = "a lower --lr" if training.loss_scale is None else "a lower --loss-scale or --lr"
    raise DivergedError(
        f"gradients were not finite in {run.skipped_in_a_row} steps in a row, {first} to {metrics.step}, and no update "
        "was made; --max-skipped-steps ends the run\n"
        f"  go on from a checkpoint of before step {first} with {lower}, or without the data that follow: "
        "--skip-train-iteration-range"
    )


def stop_if_drifted(run: Run) -> None:
    """Compare the parameters that ranks hold alike.

    Raises: ReplicaError, the same on every rank, where they differ. Nothing is saved but what was equal before.
    """
    run.watchdog.at("comparing replicas", run.state.step)
    drifts = run.replicas.find(run.state.step)
    if drifts:
        _finish_last_save(run)
        raise run.replicas.error(drifts, step=run.state.step, saved_step=run.saver.published_step, config=run.config)


def _finish_last_save(run: Run) -> None:
    """Let a checkpoint in flight be published, if it can be: it is from before what ends the run."""
    run.watchdog.at("saving", run.state.step)
    try:
        run.saver.finish()
    except CheckpointError as error:
        run.console.error(str(error))


def go_back_if_loss_rose(run: Run, metrics: StepMetrics) -> None:
    """Have the next start go on from before a spike of the loss, and leave out the steps around it. Every rank has the
    same losses, and so the same spike.

    Raises: LossSpikeError, the same on every rank, then; DivergedError where the loss rose again after that, or where
        there is no checkpoint from before; ReplicaError, as `stop_if_drifted` does.
    """
    spike = None if run.spikes is None else run.spikes.see(metrics.step, metrics.loss)
    if spike is None:
        return
    stop_if_drifted(run)  # What a GPU did is not to be blamed on the data.
    _finish_last_save(run)
    training = run.config.training
    margin, window = training.loss_spike_margin, training.loss_spike_window
    wanted = RollBack(first=max(1, spike.first - margin), last=spike.last + margin, spike=spike.first)
    rose = (
        f"the loss was too high in steps {spike.first} to {spike.last}, {spike.loss:.4f} in the last: more than "
        f"{spike.limit:.4f}, by the {window} losses before and --loss-spike-threshold {training.loss_spike_threshold:g}"
    )
    number = in_a_row(run.saver.roll_backs, spike.first, within=window)
    if number >= training.max_roll_backs:
        before = run.saver.newest_before(run.state, wanted)
        way = f"--load {before}" if before is not None else f"a checkpoint of before step {spike.first}"
        after = f"it rose after {number} roll-backs in a row: what comes again is not of the data; " if number else ""
        raise DivergedError(
            f"{rose}\n  {after}--max-roll-backs {training.max_roll_backs} ends the run\n"
            f"  go on from before, {way}, with a lower --lr or more --max-roll-backs"
        )
    run.watchdog.at("going back", metrics.step)
    found = run.saver.take_back(run.state, wanted)
    if found is None:
        raise DivergedError(
            f"{rose}\n  {run.config.output.save} has no checkpoint of this run from before step {spike.first}\n"
            f"  start it again with --skip-train-iteration-range {wanted.first}-{wanted.last}, and save more often"
        )
    path, decided = found
    raise LossSpikeError(
        f"{rose}\n  the run is taken back to {path}, and leaves out {decided}\n"
        f"  start it again with --load {run.config.output.save}"
    )


def evaluate(run: Run, evaluator: Evaluator) -> dict[str, float]:
    """Evaluate every set of `evaluator` and log it."""
    run.watchdog.at("evaluation", run.state.step)
    watched = partial(run.watchdog.batches, operation="evaluation", step=run.state.step)
    losses = evaluator.run(run.engine, watched=watched)
    run.compile_watch.report("evaluation", expected=True)
    for name, loss in losses.items():
        for sink in run.sinks:
            sink.log_validation(run.state.step, run.state.consumed_samples, name, loss)
    return losses


def _is_due(state: TrainState, interval: int | None) -> bool:
    """Whether `interval` steps have passed; None and 0 are never."""
    return interval is not None and interval > 0 and state.step % interval == 0

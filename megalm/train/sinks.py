"""Where the metrics of a run go."""

from __future__ import annotations

from pathlib import Path

from megalm.config.root import Config
from megalm.errors import ConfigError
from megalm.telemetry.console import Console
from megalm.telemetry.metric_log import set_aside
from megalm.telemetry.metrics import ConsoleSink, JsonlSink, Sink, TensorBoardSink, WandbSink
from megalm.telemetry.profile import StepProfiler
from megalm.topology.topology import Topology


def metrics_file(config: Config) -> Path | None:
    """The JSON-lines file of this run; none without --metrics-path and --save."""
    output = config.output
    if output.metrics_path is not None:
        return Path(output.metrics_path)
    return None if output.save is None else Path(output.save) / "metrics.jsonl"


def open_sinks(
    config: Config, topology: Topology, console: Console, *, resumed_step: int, continues_save: bool
) -> list[Sink]:
    """The console, and every record that was asked for; the first rank alone has any.

    `continues_save` says that the checkpoint of `resumed_step` lies in `--save`, and so do the records up to it.
    Raises: ConfigError if a file or folder cannot be written, or a package that was asked for is missing.
    """
    if not topology.world.is_first:
        return []
    output = config.output
    taken_back_to = None if config.training.eval_only else resumed_step  # What is evaluated happens again nowhere.
    sinks: list[Sink] = [ConsoleSink(console, log_interval=output.log_interval)]
    path = metrics_file(config)
    if output.plot is not None and path is None:
        raise ConfigError(
            f"output.plot = {output.plot} needs the records that it draws\n"
            "  output.plot set by --plot\n"
            "  pass --save or --metrics-path"
        )
    aside = None
    if path is not None and output.metrics_path is None and taken_back_to and not continues_save:
        aside = set_aside(path, taken_back_to + 1)
    if aside is not None:
        console.warning(
            f"{path} has steps of another run, as this one goes on from a checkpoint elsewhere: it is {aside.name} now"
        )
    if path is not None:
        sinks.append(JsonlSink(path, resume_step=taken_back_to, warn=console.warning))
    if output.tensorboard_dir is not None:
        board = TensorBoardSink(output.tensorboard_dir, output.tensorboard_queue_size, resume_step=taken_back_to)
        sinks.append(board)
    if output.wandb_project is not None:
        sinks.append(
            WandbSink(
                output.wandb_project,
                output.wandb_name,
                mode=output.wandb_mode,
                folder=output.wandb_dir or output.save or ".",
                config=config.values(),
                # The id beside another run's records is of its W&B run.
                resumed=resumed_step > 0 and (aside is None or output.wandb_dir is not None),
            )
        )
    return sinks


def draw_curve(config: Config, topology: Topology) -> None:
    """Draw the training and validation curve of the whole run, if --plot asks for it. The first rank does it."""
    path = metrics_file(config)
    if config.output.plot is None or path is None or not topology.world.is_first:
        return
    from megalm.telemetry.plot import plot_curve

    plot_curve(path, config.output.plot)


def build_profiler(config: Config, topology: Topology, console: Console) -> StepProfiler:
    """Profiles what --profile asks for, on the ranks of the first replica."""
    output = config.output
    folder = None
    if output.profile and topology.dp.is_first:
        folder = Path(output.profile_dir or Path(output.save or ".") / "profile")
    return StepProfiler(
        folder,
        first=output.profile_step_start,
        last=output.profile_step_end,
        rank=topology.world.rank,
        report=console.info,
    )

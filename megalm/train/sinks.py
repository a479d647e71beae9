"""Where the metrics of a run go."""

from __future__ import annotations

from pathlib import Path

from megalm.config.root import Config
from megalm.telemetry.console import Console
from megalm.telemetry.metrics import Sink
from megalm.topology.topology import Topology


def open_sinks(config: Config, topology: Topology, console: Console, *, resumed_step: int) -> list[Sink]:
    """The console, and every record that was asked for; the first rank alone has any.

    Raises: ConfigError if a file or folder cannot be written.
    """
    if not topology.world.is_first:
        return []
    from megalm.telemetry.metrics import ConsoleSink, JsonlSink

    output = config.output
    sinks: list[Sink] = [ConsoleSink(console, log_interval=output.log_interval)]
    return sinks

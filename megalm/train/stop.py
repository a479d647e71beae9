"""Why a run ends early, agreed on by all ranks before any of them acts on it."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType

import torch
import torch.distributed

from megalm.topology.topology import Topology

EXIT_FINISHED = 0
EXIT_ASKED_TO_STOP = 75
"""The run stopped because it was asked to, and saved if it had been given a folder; starting it again with --load
continues it (EX_TEMPFAIL)."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopReason(IntEnum):
    """Larger wins when ranks differ."""

    NONE = 0
    INTERVAL = 1
    DURATION = 2
    KILL_SWITCH = 3
    SIGNAL = 4

    @property
    def sentence(self) -> str:
        """What the log says."""
        return {
            StopReason.NONE: "training is complete",
            StopReason.INTERVAL: "reached --exit-interval",
            StopReason.DURATION: "reached --exit-duration-in-mins",
            StopReason.KILL_SWITCH: "the kill-switch file exists",
            StopReason.SIGNAL: "received a signal to stop",
        }[self]


@dataclass
class StopRequest:
    """Collects this rank's reasons to stop; `agree` makes one decision of all ranks'."""

    exit_interval: int | None = None
    duration_minutes: float | None = None
    kill_switch_path: str | None = None
    _signalled: bool = False
    _started: float = 0.0

    def listen(self) -> None:
        """Start the clock and turn the signals into a request; the step under way is finished first."""
        self._started = time.monotonic()
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def local_reason(self, step: int | None) -> StopReason:
        """What this rank alone would do after `step`; None stands for before the first step of this process."""
        if self._signalled:
            return StopReason.SIGNAL
        if self.kill_switch_path is not None and os.path.exists(self.kill_switch_path):
            return StopReason.KILL_SWITCH
        if self.duration_minutes is not None and time.monotonic() - self._started > 60.0 * self.duration_minutes:
            return StopReason.DURATION
        if step is not None and self.exit_interval is not None and step % self.exit_interval == 0:
            return StopReason.INTERVAL
        return StopReason.NONE

    def agree(self, step: int | None, topology: Topology) -> StopReason:
        """The strongest reason of any rank.

        Communicates: one all-reduce of an integer over the world.
        """
        reason = self.local_reason(step)
        if topology.world.size == 1:
            return reason
        strongest = torch.tensor(int(reason), device=topology.device)
        torch.distributed.all_reduce(strongest, op=torch.distributed.ReduceOp.MAX, group=topology.world.handle)
        return StopReason(int(strongest.item()))

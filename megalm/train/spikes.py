"""Whether the loss has risen, and stayed up, against what it was in the steps before."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megalm.checkpoint.roll_backs import SPIKE_WATCH
from megalm.config.training import TrainingConfig
from megalm.errors import CheckpointError
from megalm.train.state import DAMAGED

LEAST_RISE_NATS = 0.1
"""Where losses hardly differ from each other, any of them may lie many standard deviations away."""


@dataclass(frozen=True)
class Spike:
    """Steps in a row whose losses are too high."""

    first: int
    last: int
    loss: float
    """Of the last one."""
    limit: float
    """What none of them should have passed."""


@dataclass
class SpikeWatch:
    """Looks at the loss of every step. All of it is in checkpoints, so that restarts change nothing.

    A loss is too high if it exceeds the mean of the last `window` losses by more than `threshold` of their standard
    deviations, and by `LEAST_RISE_NATS`. `steps` of them in a row are a spike; fewer are noise, and join the others
    once one is not too high. Before `window` losses were seen none is; one that is not finite is passed over.
    """

    threshold: float
    window: int
    steps: int
    losses: deque[float] = field(default_factory=deque)
    """Those of the window."""
    high: list[float] = field(default_factory=list)
    """Those after them that are too high, up to the last step."""

    def __post_init__(self) -> None:
        self._fill(self.losses)

    @classmethod
    def from_config(cls, training: TrainingConfig) -> SpikeWatch | None:
        """The watch that is asked for, if one is."""
        if training.loss_spike_threshold <= 0:
            return None
        return cls(training.loss_spike_threshold, training.loss_spike_window, training.loss_spike_steps)

    def see(self, step: int, loss: float) -> Spike | None:
        """The spike that this loss completes, if it does."""
        if not math.isfinite(loss):
            return None
        limit = self._limit()
        self.high.append(loss)
        if loss <= limit:
            self.losses.extend(self.high)
            self.high.clear()
            return None
        if len(self.high) < self.steps:
            return None
        return Spike(step - len(self.high) + 1, step, loss, limit)

    def _limit(self) -> float:
        if len(self.losses) < self.window:
            return math.inf
        mean = math.fsum(self.losses) / self.window
        deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in self.losses) / self.window)
        return mean + max(self.threshold * deviation, LEAST_RISE_NATS)

    def to_json(self) -> dict[str, Any]:
        """Plain values for train_state.json."""
        return {"losses": list(self.losses), "high": list(self.high)}

    def resume(self, stored: object) -> None:
        """Go on from what `to_json` wrote, perhaps with another window; from nothing if there is nothing.

        Raises: CheckpointError if it is something else.
        """
        if stored is None:
            return
        known = [stored.get(name) for name in ("losses", "high")] if isinstance(stored, dict) else []
        lists = [[loss for loss in part if _is_loss(loss)] for part in known if isinstance(part, list)]
        if len(lists) != 2 or lists != known:
            raise CheckpointError(f"train_state.json: {SPIKE_WATCH} does not hold two lists of losses{DAMAGED}")
        self._fill(lists[0])
        self.high = lists[1]

    def _fill(self, losses: Iterable[float]) -> None:
        self.losses = deque(losses, maxlen=self.window)


def _is_loss(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)

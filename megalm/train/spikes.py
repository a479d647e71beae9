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
    since: int = 0
    """Step of the first of these."""

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
        self.since = self.since if self.high else step  # Steps may be left out between them.
        self.high.append(loss)
        if loss <= limit:
            self.losses.extend(self.high)
            self.high.clear()
            return None
        if len(self.high) < self.steps:
            return None
        return Spike(self.since, step, loss, limit)

    def _limit(self) -> float:
        if len(self.losses) < self.window:
            return math.inf
        mean = math.fsum(self.losses) / self.window
        deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in self.losses) / self.window)
        return mean + max(self.threshold * deviation, LEAST_RISE_NATS)

    def to_json(self) -> dict[str, Any]:
        """Plain values for train_state.json."""
        return {"losses": list(self.losses), "high": list(self.high), "since": self.since}

    def resume(self, stored: object) -> None:
        """Go on from what `to_json` wrote, perhaps with another window; from nothing if there is nothing.

        Raises: CheckpointError if it is something else.
        """
        if stored is None:
            return
        known: dict[str, Any] = stored if isinstance(stored, dict) else {}
        losses, high, since = known.get("losses"), known.get("high"), known.get("since")
        lists = isinstance(losses, list) and isinstance(high, list) and all(map(_is_loss, (*losses, *high)))
        if not lists or not isinstance(since, int) or since < 0:
            raise CheckpointError(
                f"train_state.json: {SPIKE_WATCH} does not hold two lists of losses and a step{DAMAGED}"
            )
        self._fill(known["losses"])
        self.high, self.since = list(known["high"]), since

    def _fill(self, losses: Iterable[float]) -> None:
        self.losses = deque(losses, maxlen=self.window)


def _is_loss(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)

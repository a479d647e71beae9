"""The learning rate and the batch size as functions of progress: nothing to save, nothing to drift."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megalm.config.training import TrainingConfig


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to `peak`, then a decay to `minimum`, both measured in one unit: steps or samples."""

    peak: float
    minimum: float
    warmup: float
    decay: float
    style: str

    def at(self, before: float, after: float) -> float:
        """Learning rate of the update between two counts of steps (or samples).

        No update has rate 0, which would waste it: the first of a warm-up of w steps uses peak / w and the last the
        peak, and the decay begins at the peak and reaches the minimum with the first update after it.

        Source: Megatron-LM's schedulers, which take the count before the update; in warm-up, too, where the first then
        has rate 0.
        """
        if before < self.warmup:
            return self.peak * min(1.0, after / self.warmup)
        if self.style == "constant":
            return self.peak
        if before >= self.decay:
            return self.minimum
        share = (before - self.warmup) / (self.decay - self.warmup)
        remaining = 1.0 - share if self.style == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
        return self.minimum + (self.peak - self.minimum) * remaining

    @classmethod
    def from_config(cls, training: TrainingConfig) -> LearningRate:
        """The schedule of a run; decay lasts as long as the training unless said otherwise."""
        if training.by_samples:
            decay = training.lr_decay_samples or training.train_samples or 0
            warmup: float = training.lr_warmup_samples
        else:
            decay = training.lr_decay_iters or training.train_iters or 0
            warmup = training.lr_warmup_iters
        if training.lr_warmup_fraction is not None:
            warmup = training.lr_warmup_fraction * decay
        return cls(
            peak=training.lr,
            minimum=training.min_lr,
            warmup=warmup,
            decay=decay,
            style=training.lr_decay_style,
        )


@dataclass(frozen=True)
class BatchSize:
    """Samples in a step, growing from `start` by `increment` over `ramp_samples` samples, or constant."""

    final: int
    start: int
    increment: int
    ramp_samples: int

    def at(self, consumed_samples: int) -> int:
        """Global batch size of the step that starts after `consumed_samples`.

        Source: the ramp of Megatron-LM's `--rampup-batch-size START INCREMENT SAMPLES`: equal shares of the samples
        are spent at START, START + INCREMENT, ... up to the final size.
        """
        if self.increment == 0 or consumed_samples >= self.ramp_samples:
            return self.final
        increments = (self.final - self.start) // self.increment
        samples_per_increment = self.ramp_samples / increments
        return min(self.final, self.start + int(consumed_samples / samples_per_increment) * self.increment)

    @classmethod
    def from_config(cls, training: TrainingConfig, *, dp_size: int) -> BatchSize:
        """The batch sizes of a run. Divisibility was checked with the configuration."""
        final = training.global_batch_size or training.micro_batch_size * dp_size
        if training.rampup_batch_size is None:
            return cls(final=final, start=final, increment=0, ramp_samples=0)
        start, increment, ramp_samples = training.rampup_batch_size
        if start == final:
            return cls(final=final, start=final, increment=0, ramp_samples=0)
        return cls(final=final, start=start, increment=increment, ramp_samples=ramp_samples)

    def steps_for(self, samples: int, *, consumed: int = 0) -> int:
        """Steps after `consumed` samples until at least `samples` are consumed."""
        steps = 0
        while consumed < samples and consumed < self.ramp_samples:
            consumed += self.at(consumed)
            steps += 1
        return steps + max(0, -(-(samples - consumed) // self.final))

    def steps_of(self, training: TrainingConfig, *, step: int = 0, consumed: int = 0) -> int:
        """Steps of the whole run, however its length was given; those after `step`, with the batch that it has now."""
        if training.train_samples is not None:
            return self.steps_for(training.train_samples, consumed=consumed)
        return max(0, (training.train_iters or 0) - step)

    def samples_for(self, steps: int, *, consumed: int = 0) -> int:
        """Samples that are consumed `steps` steps after `consumed`."""
        for step in range(steps):
            if consumed >= self.ramp_samples:
                return consumed + (steps - step) * self.final
            consumed += self.at(consumed)
        return consumed

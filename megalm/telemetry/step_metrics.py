"""What one step tells the records of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One update of the parameters, as every sink sees it."""

    step: int
    """Updates since the start of training, this one included."""
    total_steps: int
    """Updates of the whole run."""
    consumed_samples: int
    """Samples since the start of training."""
    consumed_tokens: int
    """Tokens since the start of training."""
    loss: float
    """Mean over the global batch, nats per token."""
    lr: float
    """Learning rate of this update."""
    grad_norm: float | None
    """2-norm of the whole gradient before clipping, where the engine knows it."""
    step_seconds: float
    """Duration of this step."""
    tokens_per_second: float
    """Tokens of the whole run per second, averaged over recent steps."""
    tflops: float
    """10^12 operations of the model per second and process."""
    eta_seconds: float
    """Time to the last step at the recent speed."""
    loss_scale: float | None = None
    """fp16's loss scale."""
    skipped: bool = False
    """Whether the update was left out because a gradient was not finite."""
    global_batch_size: int | None = None
    """Samples of this step."""
    data_seconds: float | None = None
    """What of the step the first rank waited for batches."""
    peak_memory_bytes: int | None = None
    """The most memory that this process has had: tensors on a GPU, the whole process on a CPU."""

"""Metrics of made-up steps."""

from __future__ import annotations

from typing import Any

from megalm.telemetry.metrics import StepMetrics


def step_metrics(step: int, **changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "step": step,
        "total_steps": 600,
        "consumed_samples": 8 * step,
        "consumed_tokens": 1024 * step,
        "loss": 6.1234,
        "lr": 3e-3,
        "grad_norm": 0.81,
        "step_seconds": 0.2,
        "tokens_per_second": 5120.0,
        "tflops": 0.02,
        "eta_seconds": 83.0,
    }
    return StepMetrics(**{**values, **changes})

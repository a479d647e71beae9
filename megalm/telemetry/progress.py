"""The wording of the progress line."""

from __future__ import annotations

import math

from megalm.telemetry.step_metrics import StepMetrics


def progress_line(m: StepMetrics) -> str:
    """`step    40/  600 | loss 6.1234 | lr 3.00e-03 | grad norm 0.81 | 5.1k tok/s | 0.02 TFLOP/s | ETA 1:23`."""
    parts = [f"step {m.step:>5}/{m.total_steps:>5}", f"loss {m.loss:.4f}", f"lr {m.lr:.2e}"]
    if m.grad_norm is not None:
        parts.append(f"grad norm {m.grad_norm:.2f}")
    if m.loss_scale is not None:
        parts.append(f"loss scale {m.loss_scale:g}")
    if m.skipped:
        parts.append("update skipped")
    parts += [f"{rate(m.tokens_per_second)} tok/s", f"{teraflops(m.tflops)} TFLOP/s", f"ETA {duration(m.eta_seconds)}"]
    return " | ".join(parts)


def validation_line(step: int, name: str, loss: float) -> str:
    """`step    40       | valid loss 6.0123 | perplexity 408.4`."""
    return f"step {step:>5}       | {name} loss {loss:.4f} | perplexity {perplexity(loss):.4g}"


def perplexity(loss: float) -> float:
    """exp(loss), held below e^20 as the field's logs have it, so that a diverged run can still be drawn."""
    return math.exp(20.0 if loss > 20.0 else loss)  # min() would take NaN for 20


def rate(per_second: float) -> str:
    """912, 5.1k, 48.4k, 1.2M."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if per_second >= factor:
            return f"{per_second / factor:.1f}{suffix}"
    return f"{per_second:.0f}"


def teraflops(value: float) -> str:
    """0.0043, 0.02, 3.14, 412.3: two digits that say something at any scale."""
    if value >= 100:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.01 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """0:07, 1:23, 1:02:03, 2d 03:04:05."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"

"""Rows of logits by torch's own kernels: on any device, the fastest form on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


class TorchRows:
    """A `VocabularyRows`. Exponentials, or 16-bit logits widened, take one temporary."""

    def bytes_per_logit(self, dtype: torch.dtype) -> int:
        return dtype.itemsize + torch.promote_types(dtype, torch.float32).itemsize

    def statistics(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        peak = logits.amax(dim=-1).to(torch.promote_types(logits.dtype, torch.float32))
        return peak, (logits - peak.unsqueeze(-1)).exp_().sum(dim=-1)

    def gradient_(self, logits: Tensor, labels: Tensor, log_sum: Tensor, weights: Tensor, *, z_loss: float) -> None:
        wide = logits if logits.dtype == log_sum.dtype else logits.to(log_sum.dtype)
        wide.sub_(log_sum.unsqueeze(-1)).exp_()
        self._finish(logits, wide, labels, weights * (1.0 + 2.0 * z_loss * log_sum), weights)

    def log_sum_and_gradient_(
        self, logits: Tensor, labels: Tensor, weights: Tensor, *, z_loss: float
    ) -> tuple[Tensor, Tensor | None]:
        peak = logits.amax(dim=-1).to(torch.promote_types(logits.dtype, torch.float32))
        wide = logits if logits.dtype == peak.dtype else logits.to(peak.dtype)
        total = wide.sub_(peak.unsqueeze(-1)).exp_().sum(dim=-1)
        log_sum = total.log() + peak
        if z_loss == 0.0:
            self._finish(logits, wide, labels, None, total)
            return log_sum, weights / total
        self._finish(logits, wide, labels, weights * (1.0 + 2.0 * z_loss * log_sum) / total, weights)
        return log_sum, None

    def scale_(self, x: Tensor, factor: Tensor, factors: Tensor | None = None) -> None:
        x.mul_(factor if factors is None else (factor * factors).unsqueeze(-1))

    def scaled(self, x: Tensor, factors: Tensor) -> Tensor:
        return (x * factors.unsqueeze(-1)).to(x.dtype)

    def _finish(
        self, logits: Tensor, exponentials: Tensor, labels: Tensor, slope: Tensor | None, at_label: Tensor
    ) -> None:
        """logits = slope exponentials - at_label [column is the label]; without a slope, 1."""
        if slope is not None:
            exponentials.mul_(slope.unsqueeze(-1))
        hot = torch.where(labels < 0, 0.0, -at_label)
        exponentials.scatter_add_(-1, labels.clamp(min=0).unsqueeze(-1), hot.to(exponentials.dtype).unsqueeze(-1))
        if exponentials is not logits:
            logits.copy_(exponentials)

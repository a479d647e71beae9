"""What an implementation of the update promises."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class AdamWKernel(Protocol):
    """One update of flat fp32 masters with decoupled weight decay, and of the 16-bit weights that stand for them."""

    def update_(
        self,
        master: Tensor,
        gradient: Tensor,
        weight: Tensor,
        *,
        step: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        factor: Tensor | None = None,
    ) -> None:
        """AdamW on gradient / factor; then weight is master, rounded to the nearest even, and gradient is 0.

        `step`, `exp_avg` and `exp_avg_sq` are the state as torch.optim.AdamW names and keeps it; this adds 1 to the
        step. Does not wait for the device.

        Shapes: all [size], contiguous and fp32, weight in its own dtype; step and factor [] fp32.
        """

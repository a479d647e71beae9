"""The update by torch's own kernels: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class TorchAdamW:
    """An `AdamWKernel` for every device, in three passes."""

    @torch.no_grad()
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
        adamw(
            [master], [gradient], [exp_avg], [exp_avg_sq], [], [step],
            fused=True, amsgrad=False, maximize=False, grad_scale=factor,
            lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay,
        )  # fmt: skip
        weight.copy_(master)
        gradient.zero_()

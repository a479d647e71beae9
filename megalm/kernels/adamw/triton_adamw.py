"""The update in one pass, in Triton: 34 bytes a parameter.

torch's fused AdamW moves 28, and 32 where it clips, as it writes the gradient that it divided; the copy to 16 bits
moves 6 more and clearing the sum 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalm.kernels.triton_language import ceil_div, jit, tl

# Four elements a thread: with eight, results are exchanged between threads before they are written.
BLOCK, NUM_WARPS = 1024, 8


@jit
def adamw_step(
    step: tl.tensor,
    scalars: tl.tensor,
    lr: tl.tensor,
    LOG2_BETA1: tl.constexpr,
    LOG2_BETA2: tl.constexpr,
) -> None:
    """Count the update, and leave lr / (1 - beta1^step) and the root of 1 - beta2^step. Shapes: scalars [2] fp32.

    In fp64, as in fp32 1 - beta2^step is off by 1e-5 of itself in the first steps of beta2 = 0.999.
    """
    count = tl.load(step) + 1.0
    tl.store(step, count)
    wide = count.to(tl.float64)
    tl.store(scalars, (lr / (1.0 - tl.exp2(wide * LOG2_BETA1))).to(tl.float32))
    tl.store(scalars + 1, tl.sqrt(1.0 - tl.exp2(wide * LOG2_BETA2)).to(tl.float32))


@jit
def adamw_update(
    master: tl.tensor,
    gradient: tl.tensor,
    weight: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    scalars: tl.tensor,
    factor: tl.tensor,
    lr: tl.tensor,
    size: tl.tensor,
    SHARE1: tl.constexpr,
    SHARE2: tl.constexpr,
    EPS: tl.constexpr,
    DECAY: tl.constexpr,
    DIVIDES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """SHARE1 and SHARE2 are 1 - beta, of which fp32 would keep few digits if it were computed here."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    g = tl.load(gradient + places, mask=inside, other=0.0)
    m = tl.load(exp_avg + places, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + places, mask=inside, other=0.0)
    p = tl.load(master + places, mask=inside, other=0.0)
    if DIVIDES:
        g = tl.div_rn(g, tl.load(factor))
    m += SHARE1 * (g - m)
    v += SHARE2 * (g * g - v)
    p -= lr * DECAY * p
    p -= tl.div_rn(tl.load(scalars) * m, tl.div_rn(tl.sqrt_rn(v), tl.load(scalars + 1)) + EPS)
    tl.store(exp_avg + places, m, mask=inside)
    tl.store(exp_avg_sq + places, v, mask=inside)
    tl.store(master + places, p, mask=inside)
    tl.store(weight + places, p.to(weight.dtype.element_ty), mask=inside)
    tl.store(gradient + places, tl.zeros([BLOCK], tl.float32), mask=inside)


class TritonAdamW:
    """An `AdamWKernel` for GPUs; every run gives the same bits."""

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
        scalars, size = master.new_empty(2), master.numel()
        logarithms = {"LOG2_BETA1": _log2(betas[0]), "LOG2_BETA2": _log2(betas[1])}
        adamw_step[(1,)](step, scalars, lr, **logarithms, num_warps=1)
        if size == 0:
            return
        adamw_update[(ceil_div(size, BLOCK),)](
            master, gradient, weight, exp_avg, exp_avg_sq, scalars, scalars if factor is None else factor, lr, size,
            SHARE1=1.0 - betas[0], SHARE2=1.0 - betas[1], EPS=eps, DECAY=weight_decay,
            DIVIDES=factor is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip


def _log2(beta: float) -> float:
    # A beta of 0 is allowed, and its powers are 0: so is 2^-9999.
    return math.log2(beta) if beta > 0.0 else -9999.0

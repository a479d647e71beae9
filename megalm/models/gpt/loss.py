"""The training objective."""

from __future__ import annotations

import torch
from torch import Tensor

from megalm.models.blocks.head import HeadInput, head_loss
from megalm.models.gpt.plan import GPTPlan
from megalm.parallel.cross_entropy import vocab_parallel_cross_entropy
from megalm.topology.group import Group


def next_token_loss(logits: Tensor, labels: Tensor, loss_mask: Tensor, *, tp: Group, z_loss: float = 0.0) -> Tensor:
    """Mean negative log-likelihood over the tokens that count; 0 where none does.

    While gradients are recorded, z_loss times the square of log(sum of exp(logits)) is added; an evaluation is pure.

    Shapes: logits [s, b, v/t], labels [b, s], loss_mask [b, s] -> scalar fp32.
    Units: nats per token.
    Communicates: as `vocab_parallel_cross_entropy`.
    """
    losses = vocab_parallel_cross_entropy(logits, labels.t(), tp=tp, z_loss=_in_training(z_loss))  # [s, b]
    mask = loss_mask.t().float()
    return (losses * mask).sum() / mask.sum().clamp(min=1.0)


def fused_next_token_loss(head: HeadInput, labels: Tensor, loss_mask: Tensor, *, plan: GPTPlan) -> Tensor:
    """`next_token_loss` of what the head multiplies, by the plan's kernels.

    Shapes: head.x [s, b, h] ([s/t, b, h] with sequence parallelism), labels [b, s], loss_mask [b, s] -> scalar fp32.
    Units: nats per token.
    Communicates: as `head_loss`.
    """
    assert plan.kernels.head is not None, plan.kernels
    mask = loss_mask.t().float()
    return head_loss(
        head,
        labels.t(),
        mask / mask.sum().clamp(min=1.0),
        rows=plan.kernels.head,
        kernel=plan.kernels.head_linear,
        spread=plan.spread,
        z_loss=_in_training(plan.z_loss),
    )


def _in_training(z_loss: float) -> float:
    return z_loss if torch.is_grad_enabled() else 0.0

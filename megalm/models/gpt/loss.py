"""The training objective."""

from __future__ import annotations

from torch import Tensor

from megalm.parallel.cross_entropy import vocab_parallel_cross_entropy
from megalm.topology.group import Group


def next_token_loss(logits: Tensor, labels: Tensor, loss_mask: Tensor, *, tp: Group) -> Tensor:
    """Mean negative log-likelihood over the tokens that count; 0 where none does.

    Shapes: logits [s, b, v/t], labels [b, s], loss_mask [b, s] -> scalar fp32.
    Units: nats per token.
    Communicates: as `vocab_parallel_cross_entropy`.
    """
    losses = vocab_parallel_cross_entropy(logits, labels.t(), tp=tp)  # [s, b]
    mask = loss_mask.t().float()
    return (losses * mask).sum() / mask.sum().clamp(min=1.0)

"""Cross-entropy over logits whose vocabulary is cut over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.parallel.embedding import local_ids
from megalm.topology.group import Group


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, *, tp: Group, z_loss: float = 0.0) -> Tensor:
    """Negative log-likelihood per token, without gathering the vocabulary, plus z_loss * log(sum of exp(logits))^2.

    Shapes: logits [s, b, v/t], labels [s, b] global ids -> loss [s, b] fp32.
    Units: nats.
    Communicates: two all-reduces over tp in forward, of [s, b] and of [2, s, b]; none in backward.
    Raises: RuntimeError (a device assertion on GPUs) for a label outside the vocabulary.
    Source: Shoeybi et al. 2019, sec. 3, arXiv:1909.08053; z-loss: Chowdhery et al. 2022, sec. 5, arXiv:2204.02311.
    """
    loss: Tensor = _VocabParallelCrossEntropy.apply(logits, labels, tp, z_loss)
    return loss


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, tp: Group, z_loss: float) -> Tensor:
        peak = logits.amax(dim=-1).float()  # [s, b, v/t] -> [s, b]
        if tp.size > 1:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=tp.handle)
        local, elsewhere = local_ids(labels, logits.size(-1) * tp.size, tp=tp)
        exponentials = logits.float() - peak.unsqueeze(-1)
        target = exponentials.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        sums = torch.stack((exponentials.exp_().sum(dim=-1), target))  # [2, s, b]
        if tp.size > 1:
            dist.all_reduce(sums, group=tp.handle)
        # Half-precision logits are kept as they are and their exponentials computed again: half the memory.
        kept = exponentials if logits.dtype == torch.float32 else logits
        ctx.save_for_backward(kept, local, elsewhere, peak, sums[0])
        ctx.z_loss = z_loss
        loss = sums[0].log() - sums[1]
        return loss if z_loss == 0.0 else loss + z_loss * (sums[0].log() + peak).square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        kept, local, elsewhere, peak, total = ctx.saved_tensors
        # Gradient of the loss to the logits: softmax - 1 at the label.
        per_token = grads[0]
        exponentials = kept if kept.dtype == torch.float32 else (kept.float() - peak.unsqueeze(-1)).exp_()
        # The derivative of log(sum of exp) is the softmax.
        slope = per_token * (1.0 + 2.0 * ctx.z_loss * (total.log() + peak))
        grad = exponentials * (slope / total).unsqueeze(-1)
        grad.scatter_add_(-1, local.unsqueeze(-1), (-per_token).masked_fill(elsewhere, 0.0).unsqueeze(-1))
        return grad.to(kept.dtype), None, None, None

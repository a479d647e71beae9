"""Cross-entropy of next-token prediction on one device: the oracle of the vocabulary-parallel form."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of every label, in fp32 (float64 for float64 logits).

    Shapes: logits [..., v], labels [...] int64 -> [...] fp32.
    Units: nats.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = wide.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return torch.logsumexp(wide, dim=-1) - chosen

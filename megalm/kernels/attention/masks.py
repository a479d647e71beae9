"""The two forms of an attention mask, and the causal one."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(num_positions: int, device: torch.device) -> Tensor:
    """True where the key comes after the query. Shapes: -> [s, s] bool."""
    return torch.ones(num_positions, num_positions, dtype=torch.bool, device=device).triu(diagonal=1)


def square_mask(mask: Tensor) -> Tensor:
    """A mask with a number for every pair of positions, from either form.

    Shapes: mask bool [b or 1, 1, s, s], or int [b, s], the first key that each query sees -> bool [b or 1, 1, s, s].
    """
    if mask.dim() == 4:
        return mask
    keys = torch.arange(mask.size(1), device=mask.device)
    return (keys < mask[:, :, None])[:, None]

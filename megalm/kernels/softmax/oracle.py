"""Scale-mask-softmax written out: the specification that every faster implementation is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_mask_softmax(scores: Tensor, mask: Tensor | None, *, scale: float) -> Tensor:
    """softmax(scale * scores) without the masked positions, in fp32, rounded once to the dtype of `scores`.

    A masked position has weight exactly 0. So has every position of a row that is masked throughout: such a row, a
    query that is padding, attends to nothing. Scores must be finite: a row of -inf that no mask hides is undefined.

    Shapes: scores [..., q, k], mask bool broadcastable to it, True = masked out -> [..., q, k].
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if scale != 1.0:
        wide = wide * scale
    if mask is None:
        return torch.softmax(wide, dim=-1).to(scores.dtype)
    # The lowest finite number, not -inf: a row of -inf alone would be NaN.
    weights = torch.softmax(wide.masked_fill(mask, torch.finfo(wide.dtype).min), dim=-1)
    return weights.masked_fill(mask, 0.0).to(scores.dtype)

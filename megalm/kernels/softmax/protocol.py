"""What a scale-mask-softmax implementation promises."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ScaleMaskSoftmax(Protocol):
    """softmax(scale * scores) over the last dimension without the masked positions, in fp32.

    Shapes: scores [..., q, k], mask bool broadcastable to it, True = masked out -> [..., q, k].
    """

    def __call__(self, scores: Tensor, mask: Tensor | None, *, scale: float) -> Tensor: ...

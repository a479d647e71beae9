"""What an attention core promises."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class AttentionCore(Protocol):
    """Causal softmax attention with ALiBi, a mask and dropout.

    Query i sees the keys j <= i that the mask does not hide. A query that sees nothing gives zeros.
    Weights are softmax(q k^T / sqrt(d) + slope * (j - i)), computed in fp32 or better.
    One core serves every layer of a model: what it caches, it caches once.

    Shapes: q, k, v [b, n/t, s, d] -> [b, n/t, s, d] in the dtype of q; slopes [n/t] fp32 or None for no ALiBi;
    mask bool [b or 1, 1, s, s], True = masked out, or int [b, s], the first key that each query sees, or None.
    """

    sums_bias_gradient: bool
    """Whether `from_fused` takes the projection's bias, to sum its gradient where that of the projection is written."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        slopes: Tensor | None,
        mask: Tensor | None,
        dropout: float,
        training: bool,
    ) -> Tensor: ...

    def from_fused(
        self,
        mixed: Tensor,
        *,
        slopes: Tensor | None,
        mask: Tensor | None,
        dropout: float,
        training: bool,
        bias: Tensor | None = None,
    ) -> Tensor:
        """The same from a projection that has q, k and v of each head side by side, into the order that `dense` reads.

        The gradient of `bias` is the sum of that of `mixed`; give it only to cores that say so, and then add it to the
        projection without a history.

        Shapes: mixed [s, b, n/t, 3, d], bias [3h/t] -> [s, b, h/t].
        """
        ...

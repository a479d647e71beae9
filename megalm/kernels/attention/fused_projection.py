"""How cores that take q, k and v apart serve a projection that computes all three at once."""

from __future__ import annotations

from torch import Tensor

from megalm.kernels.attention.protocol import AttentionCore


def split_projection(mixed: Tensor) -> tuple[Tensor, ...]:
    """Views of q, k and v. Shapes: [s, b, n/t, 3, d] -> 3 of [b, n/t, s, d]."""
    return tuple(part.permute(1, 2, 0, 3) for part in mixed.unbind(dim=3))


class SplitProjection:
    """Gives a core that has `__call__` the second method of `AttentionCore`."""

    sums_bias_gradient = False

    def from_fused(
        self: AttentionCore,
        mixed: Tensor,
        *,
        slopes: Tensor | None,
        mask: Tensor | None,
        dropout: float,
        training: bool,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Shapes: mixed [s, b, n/t, 3, d] -> [s, b, h/t]."""
        assert bias is None, "this core leaves the bias's gradient to the projection"
        q, k, v = split_projection(mixed)
        context = self(q, k, v, slopes=slopes, mask=mask, dropout=dropout, training=training)
        return context.permute(2, 0, 1, 3).flatten(2)  # [b, n/t, s, d] -> [s, b, h/t]

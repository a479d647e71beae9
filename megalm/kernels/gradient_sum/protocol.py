"""What an implementation of gradient sums promises."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class GradientSumKernel(Protocol):
    """Adds the gradients of one micro-batch to fp32 sums, in fp32 and in a fixed order."""

    def add_(self, total: Tensor, gradient: Tensor, *, factor: Tensor | None = None) -> None:
        """total += factor * gradient. Shapes: total [size] fp32, gradient of that size and any dtype, factor []."""

    def add_rows_(self, total: Tensor, ids: Tensor, rows: Tensor) -> None:
        """total[ids[i]] += rows[i] for every i whose id is not negative.

        Shapes: total [v, h] fp32, ids [n] int64, rows [n, h].
        """

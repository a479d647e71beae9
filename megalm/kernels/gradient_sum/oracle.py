"""Gradient sums by torch's own operations: the specification."""

from __future__ import annotations

from torch import Tensor


class TorchGradientSum:
    """A `GradientSumKernel` for every device; on GPUs `add_rows_` adds in no fixed order."""

    def add_(self, total: Tensor, gradient: Tensor, *, factor: Tensor | None = None) -> None:
        if factor is not None:
            gradient = gradient.to(total.dtype) * factor
        total.add_(gradient.reshape(total.shape))

    def add_rows_(self, total: Tensor, ids: Tensor, rows: Tensor) -> None:
        present = (ids >= 0).unsqueeze(-1)
        total.index_add_(0, ids.clamp(min=0), rows.to(total.dtype) * present)

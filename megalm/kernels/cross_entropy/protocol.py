"""What the element-wise part of a fused head and cross-entropy promises."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class VocabularyRows(Protocol):
    """Softmax statistics and gradients of rows of logits, one row a token, the gradient in place of the logits.

    Arithmetic is fp32 (float64 for float64 logits) whatever the dtype of the logits. With log_sum L of a row, the loss
    of its token is L - logit[label] + z * L^2, so that the gradient is

        weight * ((1 + 2 z L) * exp(logit - L) - [column is the label])

    Labels are columns; a row whose label is elsewhere, on another tensor-parallel rank, has -1.

    Shapes: logits [c, v/t] with contiguous rows; peak, total, log_sum, weights [c] fp32; labels [c] int64.
    """

    def bytes_per_logit(self, dtype: torch.dtype) -> int:
        """Bytes that a chunk takes for each logit, temporaries included."""

    def statistics(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit of every row, and the sum of exp(logit - largest)."""

    def gradient_(self, logits: Tensor, labels: Tensor, log_sum: Tensor, weights: Tensor, *, z_loss: float) -> None:
        """Replace the logits by the gradient of the weighted loss."""

    def log_sum_and_gradient_(
        self, logits: Tensor, labels: Tensor, weights: Tensor, *, z_loss: float
    ) -> tuple[Tensor, Tensor | None]:
        """`statistics` and `gradient_` at once, for rows that hold the whole vocabulary.

        Returns log_sum, and None or factors [c] fp32: what replaced the logits is then the gradient of each row over
        its factor, and the products with it have to take the factor.
        """

    def scale_(self, x: Tensor, factor: Tensor, factors: Tensor | None = None) -> None:
        """Multiply in place by a scalar that lives on the device, and each row by its own of `factors`; cheap if there
        are none and the scalar is 1. Shapes: x [n, h] contiguous, factor [], factors [n] fp32."""

    def scaled(self, x: Tensor, factors: Tensor) -> Tensor:
        """Each row times its factor, rounded once. Shapes: x [n, h], factors [n] fp32 -> [n, h]."""

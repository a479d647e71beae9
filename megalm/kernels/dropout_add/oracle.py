"""Dropout of a branch and its addition to the residual stream."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def dropout_add(x: Tensor, residual: Tensor, prob: float, training: bool) -> Tensor:
    """residual + dropout(x). Without training, or with prob = 0, no random number is drawn.

    The order and the positional arguments are those that BLOOM's documentation gives.

    Shapes: x [...], residual [...] -> [...].
    """
    return residual + functional.dropout(x, p=prob, training=training)


def bias_dropout_add(x: Tensor, bias: Tensor, residual: Tensor, prob: float, training: bool) -> Tensor:
    """residual + dropout(x + bias).

    Shapes: x [..., h], bias [h], residual [..., h] -> [..., h].
    """
    return residual + functional.dropout(x + bias, p=prob, training=training)

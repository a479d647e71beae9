"""Samples made into the tensors of one micro-batch.

What restarts with a document, positions and attention, the model finds in the tokens itself
(`models/blocks/positions`): no mask of [b, 1, s, s] need be made here, copied, or sent from stage to stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch


class Batch(NamedTuple):
    """One micro-batch.

    Shapes: all [b, s].
    """

    tokens: torch.Tensor
    """int64: what the model reads."""
    labels: torch.Tensor
    """int64: the token after each of them."""
    loss_mask: torch.Tensor
    """fp32: 1 where the prediction counts, else 0."""

    def pin(self) -> Batch:
        """The same batch in page-locked memory, which a GPU copies from while the host goes on."""
        return Batch(*(part.pin_memory() for part in self))

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; out of pinned memory the copy is only begun, in order with what comes after."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


def make_batch(samples: Sequence[npt.NDArray[Any]], *, masked_eod_id: int | None = None) -> Batch:
    """Samples of s + 1 tokens as inputs, labels and loss mask.

    Nothing is learned from predicting what follows `masked_eod_id`, the beginning of another document.
    """
    text = np.stack(samples)
    tokens = np.ascontiguousarray(text[:, :-1])
    labels = np.ascontiguousarray(text[:, 1:])
    loss_mask = np.ones(tokens.shape, np.float32)
    if masked_eod_id is not None:
        loss_mask[tokens == masked_eod_id] = 0.0
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(loss_mask))

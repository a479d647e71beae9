"""Samples made into the tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch


class Batch(NamedTuple):
    """One micro-batch.

    Shapes: all [b, s], attention_mask [b, 1, s, s].
    """

    tokens: torch.Tensor
    """int64: what the model reads."""
    labels: torch.Tensor
    """int64: the token after each of them."""
    loss_mask: torch.Tensor
    """fp32: 1 where the prediction counts, else 0."""
    position_ids: torch.Tensor | None = None
    """int64, only with --reset-position-ids: the position within the document; otherwise 0 to s - 1."""
    attention_mask: torch.Tensor | None = None
    """bool, only with --reset-attention-mask: True where attention is forbidden, the future included."""


def make_batch(
    samples: Sequence[npt.NDArray[Any]],
    *,
    eod_id: int | None = None,
    eod_mask_loss: bool = False,
    reset_position_ids: bool = False,
    reset_attention_mask: bool = False,
) -> Batch:
    """Samples of s + 1 tokens as inputs, labels and masks. A document ends with `eod_id`."""
    if eod_id is None and (eod_mask_loss or reset_position_ids or reset_attention_mask):
        raise ValueError("masking or resetting at an end of document needs eod_id")
    text = np.stack(samples)
    tokens = np.ascontiguousarray(text[:, :-1])
    labels = torch.from_numpy(np.ascontiguousarray(text[:, 1:]))
    loss_mask = np.ones(tokens.shape, np.float32)
    if eod_mask_loss:
        loss_mask[tokens == eod_id] = 0.0
    positions = _positions_in_document(tokens == eod_id) if reset_position_ids else None
    mask = _between_documents(tokens == eod_id) if reset_attention_mask else None
    return Batch(
        torch.from_numpy(tokens),
        labels,
        torch.from_numpy(loss_mask),
        None if positions is None else torch.from_numpy(positions),
        None if mask is None else torch.from_numpy(mask),
    )


def _positions_in_document(ends: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """[b, s] ends of document -> position since the last one; the end itself still belongs to its document."""
    absolute = np.broadcast_to(np.arange(ends.shape[1], dtype=np.int64), ends.shape)
    starts = np.zeros(ends.shape, np.int64)
    starts[:, 1:] = np.where(ends[:, :-1], absolute[:, 1:], 0)
    return absolute - np.maximum.accumulate(starts, axis=1)


def _between_documents(ends: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """[b, s] ends of document -> [b, 1, s, s], True where the key lies in the future or in another document."""
    document = np.zeros(ends.shape, np.int64)
    np.cumsum(ends[:, :-1], axis=1, out=document[:, 1:])
    other = document[:, :, None] != document[:, None, :]
    future = np.triu(np.ones((ends.shape[1], ends.shape[1]), np.bool_), k=1)
    forbidden: npt.NDArray[np.bool_] = (other | future)[:, None]
    return forbidden

"""Attention written out as matrix products: the specification that every faster core is tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from megalm.kernels.attention.bias_cache import CausalAlibiCache
from megalm.kernels.attention.fused_projection import SplitProjection
from megalm.kernels.attention.masks import causal_mask, square_mask
from megalm.kernels.softmax.oracle import scale_mask_softmax


class BaddbmmAttention(SplitProjection):
    """An `AttentionCore`: one baddbmm for scores and bias, softmax in fp32, dropout, one bmm.

    The factor 1/sqrt(d) is the product's alpha, so that it acts before the sum is stored. ALiBi is exact for every
    dtype: 16-bit queries and keys are widened and the scores stay fp32 up to the softmax, because bf16 cannot tell
    neighbouring positions apart past 256. The weights are rounded to the dtype of q before they meet the values.
    """

    def __init__(self) -> None:
        self._biases = CausalAlibiCache()

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
    ) -> Tensor:
        b, n, s, d = q.shape
        scores = self._scores(q, k, slopes)  # [b*n, s, s]
        hidden = causal_mask(s, q.device)
        if mask is not None:
            hidden = hidden | square_mask(mask)  # [b or 1, 1, s, s]
        weights = scale_mask_softmax(scores.view(b, n, s, s), hidden, scale=1.0).to(q.dtype)
        weights = functional.dropout(weights, p=dropout, training=training)
        return torch.bmm(weights.view(b * n, s, s), v.reshape(b * n, s, d)).view(b, n, s, d)

    def _scores(self, q: Tensor, k: Tensor, slopes: Tensor | None) -> Tensor:
        b, n, s, d = q.shape
        wide_dtype = torch.promote_types(q.dtype, torch.float32)
        queries = q.reshape(b * n, s, d).to(wide_dtype)
        keys = k.reshape(b * n, s, d).to(wide_dtype)
        scale = 1.0 / math.sqrt(d)
        if slopes is None:
            unread = torch.empty(1, dtype=wide_dtype, device=q.device)
            return torch.baddbmm(unread, queries, keys.transpose(1, 2), beta=0.0, alpha=scale)
        bias = self._biases.get(slopes, s, wide_dtype).expand(b, n, s, s).reshape(b * n, s, s)
        return torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scale)

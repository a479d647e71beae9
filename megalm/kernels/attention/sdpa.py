"""Attention through torch.nn.functional.scaled_dot_product_attention, which picks a fused kernel where one fits."""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalm.kernels.attention.bias_cache import CausalAlibiCache
from megalm.kernels.attention.fused_projection import SplitProjection
from megalm.kernels.attention.masks import causal_mask, square_mask
from megalm.kernels.cpu import multiplies_faster_in_fp32

# torch's own order tries FlashAttention-2 first. Without a bias cuDNN takes 0.6 of its time on an H100: 0.714 against
# 1.240 ms forward and backward for 4 x 16 heads of 128 at 2,048 positions. What does not fit falls to the next one.
FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
CPU_QUERIES = 256
"""Queries in a block on a CPU, where there is a bias."""


class SdpaAttention(SplitProjection):
    """An `AttentionCore`: torch's fused kernels, with ALiBi as an additive bias that is built once for all layers.

    The bias is slope * (j - i), rounded to the dtype of q because the fused kernels ask for it. In bf16 its error is
    2^-9 of itself and so vanishes on near keys; far keys, where it is large, have weights that are small in proportion.
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
        if multiplies_faster_in_fp32(q.device, q.dtype):
            wide = self(q.float(), k.float(), v.float(), slopes=slopes, mask=mask, dropout=dropout, training=training)
            return wide.to(q.dtype)
        if q.device.type == "cpu":
            # torch's kernel reads them block by block: a fused projection's rows, 3 heads apart, cost it a sixth more.
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        dropout_p = dropout if training else 0.0
        scale = 1.0 / math.sqrt(q.size(-1))
        if mask is None:
            bias = None if slopes is None else self._biases.get(slopes, q.size(2), q.dtype).unsqueeze(0)  # [1, n, s, s]
            return _attend(q, k, v, bias, dropout_p=dropout_p, scale=scale)
        hidden = square_mask(mask) | causal_mask(q.size(2), q.device)  # [b or 1, 1, s, s]
        # The kernels disagree about rows that see nothing. Such a row is shown everything and its result is dropped.
        blind = hidden.all(dim=-1, keepdim=True)  # [b or 1, 1, s, 1]
        hidden = hidden & ~blind
        if slopes is None:
            bias = ~hidden
        else:
            bias = self._biases.get(slopes, q.size(2), q.dtype).masked_fill(hidden, float("-inf"))
            bias = bias.masked_fill(blind, 0.0)  # [b or 1, n, s, s]
        return _attend(q, k, v, bias, dropout_p=dropout_p, scale=scale).masked_fill(blind, 0.0)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, dropout_p: float, scale: float) -> Tensor:
    """Causal attention; a `bias` hides what comes later itself.

    On a CPU torch's kernel computes hidden keys too where it is given a bias. There it gets the queries in blocks, each
    with the keys up to its end: forward and backward take 0.8 of the time at 512 positions, 0.7 at 2,048.

    Shapes: q, k, v [b, n, s, d], bias [b or 1, n or 1, s, s] -> [b, n, s, d].
    """
    num_positions = q.size(2)
    if bias is None or q.device.type != "cpu" or num_positions <= CPU_QUERIES:
        with fastest_first(q):
            return functional.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, dropout_p=dropout_p, is_causal=bias is None, scale=scale
            )
    contexts = []
    for start in range(0, num_positions, CPU_QUERIES):
        end = min(start + CPU_QUERIES, num_positions)
        contexts.append(
            functional.scaled_dot_product_attention(
                q[:, :, start:end],
                k[:, :, :end],
                v[:, :, :end],
                attn_mask=bias[:, :, start:end, :end],
                dropout_p=dropout_p,
                scale=scale,
            )
        )
    return torch.cat(contexts, dim=2)


def fastest_first(q: Tensor) -> AbstractContextManager[Any]:
    """In the block torch tries its fused kernels in the order of speed; a CPU has one."""
    if q.device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel(FASTEST_FIRST, set_priority=True)

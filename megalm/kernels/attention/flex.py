"""Attention through torch's FlexAttention, whose score modification torch.compile turns into one kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megalm.errors import KernelError
from megalm.kernels.attention.fused_projection import SplitProjection
from megalm.kernels.attention.masks import square_mask


class FlexAttention(SplitProjection):
    """An `AttentionCore` without dropout. `compiled=False` is for checks on a CPU: it stores all scores."""

    def __init__(self, *, compiled: bool = True) -> None:
        # Shapes change seldom and dynamic ones give slower kernels.
        self._attend: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
        self._causal: dict[tuple[int, torch.device], BlockMask] = {}

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
        if training and dropout > 0.0:
            raise KernelError(
                f"the flex attention core cannot drop weights: attention dropout is {dropout}\n"
                "  set --attention-dropout 0 or use --attention-kernel triton, sdpa or baddbmm"
            )
        score_mod = None if slopes is None else _alibi_of(slopes)
        block_mask = self._causal_blocks(q) if mask is None else _masked_blocks(q, mask)
        context: Tensor = self._attend(
            q,
            k,
            v,
            score_mod=score_mod,
            block_mask=block_mask,
            scale=1.0 / math.sqrt(q.size(-1)),
            enable_gqa=q.size(1) != k.size(1),
        )
        return context

    def _causal_blocks(self, q: Tensor) -> BlockMask:
        key = q.size(2), q.device
        if key not in self._causal:
            self._causal[key] = create_block_mask(_is_causal, None, None, q.size(2), q.size(2), device=str(q.device))
        return self._causal[key]


def _alibi_of(slopes: Tensor) -> Callable[..., Tensor]:
    def add_alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + slopes[h] * (j - i)

    return add_alibi


def _is_causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def _masked_blocks(q: Tensor, mask: Tensor) -> BlockMask:
    if mask.dim() == 2:
        starts = mask

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (j >= starts[b, i])
    else:
        hidden = square_mask(mask).expand(q.size(0), 1, -1, -1)[:, 0]

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & ~hidden[b, i, j]

    return create_block_mask(visible, q.size(0), None, q.size(2), q.size(2), device=str(q.device))

"""The order of rows in a fused query-key-value weight."""

from __future__ import annotations

from torch import Tensor

from megalm.models.gpt.weights import Weight

CURRENT = 2.0
"""From this checkpoint version on, rows are (heads, 3, head size)."""


def in_current_order(weight: Weight, part: Tensor, *, version: float, head_size: int) -> Tensor:
    """One shard of a fused query-key-value weight or bias as (heads, 3, head size); any other weight unchanged.

    Version 0 has (3, heads, head size) within each shard, version 1.0 has (heads, head size, 3).
    Source: Megatron-LM, megatron/checkpointing.py, fix_query_key_value_ordering.
    """
    if version >= CURRENT or ".query_key_value." not in weight.name:
        return part
    heads, rest = part.size(0) // (3 * head_size), part.shape[1:]
    if version == 0:
        rows = part.view(3, heads, head_size, *rest).transpose(0, 1)
    else:
        rows = part.view(heads, head_size, 3, *rest).transpose(1, 2)
    return rows.reshape(part.shape)

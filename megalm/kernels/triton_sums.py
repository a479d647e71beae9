"""The second step of sums over rows: what each program of a kernel summed, added in a fixed order.

One launch in place of a sum, a split and a conversion for every vector: a step has thousands of kernels, and each costs
some microseconds beside its work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalm.kernels.triton_language import ceil_div, jit, tl

# Many parts at once: what a program waits for is the memory's answer, once for each turn of its loop.
PARTS_AT_ONCE, COLUMNS, NUM_WARPS = 128, 32, 8


@jit
def sum_of_parts(
    parts: tl.tensor,
    out: tl.tensor,
    num_parts: tl.tensor,
    size: tl.tensor,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Shapes: parts [num_parts, size] fp32 -> out [size]."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for start in tl.range(0, num_parts, PARTS):
        index = start + tl.arange(0, PARTS)
        inside = (index < num_parts)[:, None] & (columns < size)[None, :]
        total += tl.load(parts + index[:, None] * size + columns[None, :], mask=inside, other=0.0)
    tl.store(out + columns, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=columns < size)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension in fp32, rounded once. Shapes: [parts, ...] contiguous fp32 -> [...]."""
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    size = out.numel()
    sum_of_parts[(ceil_div(size, COLUMNS),)](
        parts, out, parts.size(0), size, PARTS=PARTS_AT_ONCE, COLUMNS=COLUMNS, num_warps=NUM_WARPS
    )
    return out

"""What kernels over the rows of a matrix share: the view of a tensor as rows, and how many programs go down them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

STRIPS_ON_CPU = 2
"""In Triton's interpreter: two, so that a program takes several tiles and several programs' sums are added."""


def as_rows(x: Tensor) -> Tensor:
    """The last dimension as contiguous rows, copied only if it is not. Shapes: [..., h] -> [rows, h]."""
    rows = x.reshape(-1, x.size(-1))
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def num_strips(num_tiles: int, device: torch.device, *, resident: int, num_columns: int = 1) -> int:
    """Programs that share `num_tiles` tiles of rows, where `num_columns` others stand beside each.

    All of them together are as many as are resident at once, `resident` on each multiprocessor: they start together,
    have equal work and end together. The number depends on the device alone, so that sums over strips repeat to the
    last bit.
    """
    if device.type != "cuda":
        return max(1, min(num_tiles, STRIPS_ON_CPU))
    return max(1, min(num_tiles, resident * _processors(device) // num_columns))


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

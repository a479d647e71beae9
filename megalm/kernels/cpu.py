"""What a CPU multiplies fast.

Without instructions for 16 bits (most CPUs without AVX-512) torch multiplies bf16 and fp16 number by number: at 3 to 12
GFLOP/s a core, where MKL multiplies the same numbers in fp32 at 60 to 80.
"""

from __future__ import annotations

import functools

import torch


def multiplies_faster_in_fp32(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether `device` is a CPU without fast products of `dtype`, which is one of 16 bits."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not _has_products(dtype)


@functools.cache
def _has_products(dtype: torch.dtype) -> bool:
    """What torch asks before it hands a product of this type to oneDNN; yes where it cannot be asked."""
    bits = "bf16" if dtype == torch.bfloat16 else "fp16"
    try:
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{bits}_supported")())
    except (AttributeError, RuntimeError):
        return True

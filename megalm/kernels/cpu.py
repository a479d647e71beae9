"""What a CPU multiplies fast.

Without instructions for 16 bits torch multiplies bf16 and fp16 number by number where there is no AVX-512, at 3 to 12
GFLOP/s a core, and emulates them where there is, at 37 to 39; MKL multiplies the same numbers in fp32 at 60 to 80, with
AVX-512 at 120 to 200.
"""

from __future__ import annotations

import functools
import platform

import torch


def multiplies_faster_in_fp32(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether `device` is a CPU without fast products of `dtype`, which is one of 16 bits."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not _has_products(dtype)


@functools.cache
def _has_products(dtype: torch.dtype) -> bool:
    """Whether torch hands a product of this type to oneDNN, and the processor has one; yes where it cannot be asked."""
    bits = "bf16" if dtype == torch.bfloat16 else "fp16"
    try:
        handed_on = bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{bits}_supported")())
    except (AttributeError, RuntimeError):
        return True
    if not handed_on or dtype != torch.bfloat16 or platform.machine().lower() not in ("x86_64", "amd64"):
        return handed_on
    return _processor_has("_is_avx512_bf16_supported") or _processor_has("_is_amx_tile_supported")


def _processor_has(question: str) -> bool:
    asked = getattr(torch.cpu, question, None)
    return True if asked is None else bool(asked())

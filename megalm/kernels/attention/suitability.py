"""Which attention cores can serve a model, and which serves it best."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from megalm.kernels.triton_support import triton_missing

HALVES = (torch.bfloat16, torch.float16)
LARGEST_TRITON_HEAD = 128
TRITON_SHARED_BYTES = 196 << 10
"""Shared memory that a program of the Triton core takes at most, on GPUs whose copy engine fills it."""
HOPPER = (9, 0)


@dataclass(frozen=True)
class AttentionUse:
    """What a model asks of its attention core."""

    alibi: bool
    head_size: int
    dtype: torch.dtype
    """Of queries, keys and values."""
    dropout: bool = False
    documents: bool = False
    """Whether tokens attend within their document alone."""


def triton_obstacle(device: torch.device) -> str | None:
    """Why megalm's Triton core cannot run on `device`; does not load Triton unless everything else is there."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "its kernels are compiled for NVIDIA GPUs"
    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, {name} has less"
    properties: Any = torch.cuda.get_device_properties(device)  # Its stub lacks the attribute.
    shared_bytes = properties.shared_memory_per_block_optin
    if capability >= HOPPER and shared_bytes < TRITON_SHARED_BYTES:
        return f"it takes {TRITON_SHARED_BYTES >> 10} KiB of shared memory, {name} has {shared_bytes >> 10}"
    if (missing := triton_missing()) is not None:
        return missing
    if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
        return "this Triton has no tensor descriptors; 3.4 has"
    return None


def triton_misfit(use: AttentionUse) -> str | None:
    """Why megalm's Triton core cannot serve a model."""
    if use.head_size > LARGEST_TRITON_HEAD or use.head_size % 8:
        return f"head size {use.head_size} is not a multiple of 8 up to {LARGEST_TRITON_HEAD}"
    if use.dtype not in (*HALVES, torch.float32):
        return f"it computes in bf16, fp16 and fp32, not in {use.dtype}"
    return None


def flex_obstacle(device: torch.device) -> str | None:
    """Why FlexAttention cannot train on `device`."""
    if device.type != "cuda":
        return "FlexAttention trains on GPUs only"
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        return "this torch has no FlexAttention"
    return triton_missing()


def flex_misfit(use: AttentionUse) -> str | None:
    """Why FlexAttention cannot serve a model."""
    return "FlexAttention has no dropout of attention weights" if use.dropout else None


def preferred_core(device: torch.device, use: AttentionUse | None) -> tuple[str, str]:
    """The name of the best core and why; without a `use`, of one that serves every model."""
    if device.type != "cuda":
        return "sdpa", "torch's fused attention is faster than separate matrix products"
    if use is None:
        return "sdpa", "torch's fused attention serves every model"
    if not use.alibi and not use.documents:
        return "sdpa", "without ALiBi and document masks nothing is faster than torch's own fused kernels"
    asked = "ALiBi" if use.alibi else "document masks"
    if use.dtype not in HALVES:
        return "sdpa", f"{asked} through a bias in memory; in {use.dtype} the other cores cannot use matrix units"
    obstacle = triton_obstacle(device) or triton_misfit(use)
    if obstacle is None and torch.cuda.get_device_capability(device) < HOPPER:
        obstacle = "it is made for the copy engine of compute capability 9.0 and slow without"
    if obstacle is None:
        return "triton", f"{asked} in registers: no [n, s, s] bias is stored or read, blocks out of sight are skipped"
    if not use.documents and flex_obstacle(device) is None and flex_misfit(use) is None:
        return "flex", f"{asked} in the kernel by FlexAttention; the triton core does not serve here: {obstacle}"
    return "sdpa", f"{asked} through a bias in memory; the triton core does not serve here: {obstacle}"

"""Which attention cores can serve a model, and which serves it best."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

HALVES = (torch.bfloat16, torch.float16)
LARGEST_TRITON_HEAD = 128


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
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
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
    return None if importlib.util.find_spec("triton") else "FlexAttention compiles to Triton, which is not installed"


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
    obstacle = triton_obstacle(device) or triton_misfit(use)
    if obstacle is not None:
        return "sdpa", f"{asked} through a bias in memory; the triton core does not serve here: {obstacle}"
    if use.dtype not in HALVES:
        return "sdpa", f"{asked} through a bias in memory; in {use.dtype} the triton core cannot use matrix units"
    return (
        "triton",
        f"{asked} in registers: no bias of [n, s, s] is stored or read, and blocks out of sight are skipped",
    )

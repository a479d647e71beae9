"""LayerNorm by NVIDIA's apex, where its compiled extension is installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor


def obstacle(device: torch.device) -> str | None:
    """Why apex cannot serve `device`, or None. PyPI's `apex` is another project, without `normalization`."""
    if device.type != "cuda":
        return "apex's kernels are for GPUs"
    if importlib.util.find_spec("fused_layer_norm_cuda") is None:
        return "NVIDIA's apex is not installed with --cuda_ext (there is no module fused_layer_norm_cuda)"
    try:
        _function()
    except (ImportError, AttributeError) as failure:
        return f"apex.normalization cannot be imported ({failure})"
    return None


@functools.cache
def _function() -> Any:
    return importlib.import_module("apex.normalization.fused_layer_norm").mixed_dtype_fused_layer_norm_affine


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The oracle's result; apex returns the dtype of the weight, which is then the dtype of `x` in most runs.

    Shapes: x [..., h], weight [h], bias [h] -> [..., h].
    """
    y: Tensor = _function()(x.contiguous(), weight, bias, weight.shape, eps)
    return y.to(x.dtype)

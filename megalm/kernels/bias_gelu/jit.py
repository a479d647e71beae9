"""Bias-GELU written out in TorchScript with a backward by hand: the specification of the fused activation.

In fp32 it errs by 4.3e-7 forward and 5.6e-7 backward. On a GPU TorchScript fuses each direction into one kernel; on a
CPU it only runs the operations one by one. TorchScript is deprecated, of which torch warns; that is silenced
here. Where scripting fails, the same functions run as plain Python and `scripting_failure` says why.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalm.kernels.bias_gelu.gelu import tanh_gelu, tanh_gelu_slope


def _forward(bias: Tensor, y: Tensor) -> Tensor:
    return tanh_gelu(y.float() + bias.float()).to(y.dtype)


def _backward(g: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    return (tanh_gelu_slope(y.float() + bias.float()) * g.float()).to(y.dtype)


@functools.cache
def _script(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], str | None]:
    """The function scripted at its first use, or itself and the reason."""
    try:
        with warnings.catch_warnings():
            for kind in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", kind)
            return torch.jit.script(function), None
    except Exception as failure:  # TorchScript raises many unrelated types.
        return function, f"{type(failure).__name__}: {failure}"


def scripting_failure() -> str | None:
    """Why TorchScript does not work here; None where it does."""
    return _script(_forward)[1] or _script(_backward)[1]


def bias_gelu(bias: Tensor, y: Tensor) -> Tensor:
    """gelu_tanh(y + bias), in fp32 inside, rounded once to the dtype of `y`.

    Shapes: bias [f], y [..., f] -> [..., f].
    """
    return _script(_forward)[0](bias, y)


def bias_gelu_back(g: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """Gradient of `bias_gelu` with respect to `y`, times the incoming gradient `g`.

    Shapes: g [..., f], bias [f], y [..., f] -> [..., f].
    """
    return _script(_backward)[0](g, bias, y)


class BiasGeLUFunction(torch.autograd.Function):
    """apply(input, bias) = gelu_tanh(input + bias); keeps its two inputs and nothing else for the backward pass.

    Shapes: input [..., f], bias [f] -> [..., f].
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(input, bias)
        return bias_gelu(bias, input)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        input, bias = ctx.saved_tensors
        grad_input = bias_gelu_back(grad_outputs[0], bias, input)
        # A sum of thousands of rows in bf16 would lose most of them: the accumulator is fp32.
        grad_bias = grad_input.reshape(-1, grad_input.size(-1)).sum(dim=0, dtype=torch.float32)
        return grad_input, grad_bias.to(bias.dtype)


def bias_gelu_jit(x: Tensor, bias: Tensor) -> Tensor:
    """`BiasGeLUFunction` as a `BiasGeluKernel`."""
    result: Tensor = BiasGeLUFunction.apply(x, bias)
    return result

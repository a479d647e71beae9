"""Gated activations written out: the specification that the Triton forms are tested against.

The first product of the MLP has 2f features, in pairs (value, gate), so that tensor shards concatenate without a
permutation: the result is value * act(gate). act is the identity (liglu), ReLU (reglu), SiLU (swiglu) or the erf GELU
(geglu), as BigScience's --glu-activation has them.
Source: Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from megalm.kernels.bias_gelu.protocol import BiasGeluKernel


def _identity(x: Tensor) -> Tensor:
    return x


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "liglu": _identity,
    "reglu": functional.relu,
    "swiglu": functional.silu,
    "geglu": functional.gelu,
}


def bias_glu(x: Tensor, bias: Tensor, gate: str) -> Tensor:
    """value * act(gate) of x + bias, in fp32 inside, rounded once to the dtype of `x`.

    Shapes: x [..., 2f], bias [2f] -> [..., f].
    """
    wide_dtype = torch.promote_types(x.dtype, torch.float32)
    pairs = (x.to(wide_dtype) + bias.to(wide_dtype)).unflatten(-1, (-1, 2))
    value, gated = pairs.unbind(-1)  # [..., f, 2] -> 2 of [..., f]
    return (value * GATES[gate](gated)).to(x.dtype)


def torch_glu(gate: str) -> BiasGeluKernel:
    """`bias_glu` with this gate, as the MLP calls an activation."""
    assert gate in GATES, gate

    def kernel(x: Tensor, bias: Tensor) -> Tensor:
        return bias_glu(x, bias, gate)

    return kernel

"""Kernels that were just compiled for this GPU, held against the references before a run relies on them.

A compiler, a driver or a GPU that nobody has tried before must cost a line in the log, not a run. Small inputs, results
and gradients; the bound is a gross one, since the tests know the errors that rounding makes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalm.kernels.alibi import alibi_slopes
from megalm.kernels.attention.baddbmm import BaddbmmAttention
from megalm.kernels.attention.suitability import AttentionUse
from megalm.kernels.bias_gelu.eager import bias_gelu
from megalm.kernels.bias_gelu.gated import torch_glu
from megalm.kernels.cross_entropy.torch_rows import TorchRows
from megalm.kernels.dropout_add.oracle import bias_dropout_add
from megalm.kernels.gradient_sum.oracle import TorchGradientSum
from megalm.kernels.layer_norm import oracle

BOUND = 0.05
"""Largest difference from the reference in fp32, over its largest value: several roundings to 8 bits of mantissa."""
EPSILON = 1e-5

Results = tuple[Tensor, ...]


class Draw:
    """Random tensors on the device. A GPU gets as many rows and positions as make programs go round their loops."""

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(17)
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.num_rows, self.num_positions = (20_011, 700) if device.type == "cuda" else (67, 150)

    def __call__(self, *shape: int) -> Tensor:
        device = self._generator.device
        return torch.randn(shape, generator=self._generator, device=device).to(self._dtype)


def failure(operation: str, kernel: Any, device: torch.device, *, use: AttentionUse | None = None) -> str | None:
    """What is wrong with a kernel of `operation` on `device`, in a few words; None if it gives the reference's numbers.

    Random streams are left as they are. Operations without a check pass.
    """
    check = _CHECKS.get(operation)
    if check is None:
        return None
    try:
        for name, got, wanted in check(kernel, Draw(device), use):
            difference = (got.float() - wanted.float()).abs().max().item()
            if not difference <= BOUND * max(wanted.float().abs().max().item(), EPSILON):
                return f"{name} differs from the reference by {difference:.3g}"
    except Exception as error:  # Whatever a compiler or a driver raises, the reference remains.
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    return None


Check = Callable[[Any, Draw, AttentionUse | None], list[tuple[str, Tensor, Tensor]]]


def _attention(kernel: Any, draw: Draw, use: AttentionUse | None) -> list[tuple[str, Tensor, Tensor]]:
    b, n, d = 2, 4, use.head_size if use is not None else 64
    s = draw.num_positions
    mixed = draw(s, b, n, 3, d)
    slopes = alibi_slopes(n).to(mixed.device) if use is None or use.alibi else None
    starts = None
    if use is not None and use.documents:
        positions = torch.arange(s, device=mixed.device, dtype=torch.int32)
        starts = torch.where(positions < s // 2, 0, s // 2).to(torch.int32).expand(b, s).contiguous()
    options: dict[str, Any] = {"slopes": slopes, "mask": starts, "dropout": 0.0, "training": True}
    sums = kernel.sums_bias_gradient

    def ours(x: Tensor, bias: Tensor) -> Tensor:
        wide = x + (bias.detach() if sums else bias).view(n, 3, d)
        result: Tensor = kernel.from_fused(wide, **options, bias=bias if sums else None)
        return result

    def theirs(x: Tensor, bias: Tensor) -> Tensor:
        return BaddbmmAttention().from_fused(x + bias.view(n, 3, d), **options)

    return _compared(ours, theirs, (mixed, draw(3 * n * d)), draw)


def _layer_norm(kernel: Any, draw: Draw, use: AttentionUse | None) -> list[tuple[str, Tensor, Tensor]]:
    from megalm.kernels.layer_norm.triton_norm import add_layer_norm, layer_norm_and_pass

    rows, h = draw.num_rows, 1024
    norm = (draw(rows, h), draw(h), draw(h))
    added = (draw(rows, h), draw(h), draw(rows, h), draw(h), draw(h))

    def reference(x: Tensor, branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Results:
        total = residual + (x + branch)
        return total, oracle.layer_norm(total, weight, bias, EPSILON)

    def beside(x: Tensor, weight: Tensor, bias: Tensor) -> Results:
        return oracle.layer_norm(x, weight, bias, EPSILON), x.clone()

    return [
        *_compared(partial(kernel, eps=EPSILON), partial(oracle.layer_norm, eps=EPSILON), norm, draw),
        *_compared(partial(layer_norm_and_pass, eps=EPSILON), beside, norm, draw),
        *_compared(partial(add_layer_norm, eps=EPSILON), reference, added, draw),
    ]


def _bias_gelu(kernel: Any, draw: Draw, use: AttentionUse | None) -> list[tuple[str, Tensor, Tensor]]:
    return _compared(kernel, bias_gelu, (draw(draw.num_rows, 512), draw(512)), draw)


def _glu(kernel: Any, draw: Draw, use: AttentionUse | None) -> list[tuple[str, Tensor, Tensor]]:
    return _compared(kernel("swiglu"), torch_glu("swiglu"), (draw(draw.num_rows, 512), draw(512)), draw)


def _head(kernel: Any, draw: Draw, use: AttentionUse | None) -> list[tuple[str, Tensor, Tensor]]:
    logits, labels = draw(9, 5000), torch.arange(9) * 500
    labels = labels.to(logits.device)
    weights = torch.ones(9, device=logits.device)
    found = []
    for rows, values in ((kernel, logits.clone()), (TorchRows(), logits.float())):
        peak, total = rows.statistics(values)
        log_sum, factors = rows.log_sum_and_gradient_(values, labels, weights, z_loss=1e-4)
        if factors is not None:
            values = values.float() * factors.unsqueeze(-1)
        found.append((peak, total, log_sum, values))
    return [(f"part {at}", got, wanted) for at, (got, wanted) in enumerate(zip(*found, strict=True))]


def _gradient_sum(kernel: Any, draw: Draw, use: AttentionUse | None) -> list[tuple[str, Tensor, Tensor]]:
    rows, gradient = draw(40, 512), draw(60, 512)
    ids = (torch.arange(40) * 7 % 13 - 1).to(rows.device)
    ours, theirs = (torch.ones(60, 512, device=rows.device) for _ in range(2))
    for one, total in ((kernel, ours), (TorchGradientSum(), theirs)):
        one.add_(total.view(-1), gradient, factor=torch.full((), 0.25, device=rows.device))
        one.add_rows_(total, ids, rows)
    return [("sum", ours, theirs)]


def _dropout_add(kernel: Any, draw: Draw, use: AttentionUse | None) -> list[tuple[str, Tensor, Tensor]]:
    """Without dropout, whose random numbers are each kernel's own; and that about a quarter of 0.25 is dropped."""
    inputs = (draw(draw.num_rows, 512), draw(512), draw(draw.num_rows, 512))
    x, bias, zero = torch.ones_like(inputs[0]), torch.zeros_like(inputs[1]), torch.zeros_like(inputs[2])
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        kept = (kernel(x, bias, zero, 0.25, True) != 0).float().mean()

    def ours(*given: Tensor) -> Tensor:
        result: Tensor = kernel(*given, 0.0, True)
        return result

    def theirs(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return bias_dropout_add(x, bias, residual, 0.0, True)

    return [*_compared(ours, theirs, inputs, draw), ("share that is kept", kept, torch.full_like(kept, 0.75))]


_CHECKS: dict[str, Check] = {
    "attention": _attention,
    "layer_norm": _layer_norm,
    "bias_gelu": _bias_gelu,
    "glu": _glu,
    "head": _head,
    "gradient_sum": _gradient_sum,
    "dropout_add": _dropout_add,
}


def _compared(
    kernel: Callable[..., Any], reference: Callable[..., Any], inputs: Results, draw: Draw
) -> list[tuple[str, Tensor, Tensor]]:
    """Results and gradients of both sides, the reference in fp32 on the same values."""
    ours = tuple(x.detach().clone().requires_grad_() for x in inputs)
    theirs = tuple(x.detach().float().requires_grad_() for x in inputs)
    got, wanted = _as_tuple(kernel(*ours)), _as_tuple(reference(*theirs))
    upstream = [draw(*result.shape) for result in got]
    got_gradients = torch.autograd.grad(got, ours, upstream)
    wanted_gradients = torch.autograd.grad(wanted, theirs, [gradient.float() for gradient in upstream])
    return [
        *((f"result {at}", *pair) for at, pair in enumerate(zip(got, wanted, strict=True))),
        *((f"gradient {at}", *pair) for at, pair in enumerate(zip(got_gradients, wanted_gradients, strict=True))),
    ]


def _as_tuple(results: Any) -> Results:
    return results if isinstance(results, tuple) else (results,)

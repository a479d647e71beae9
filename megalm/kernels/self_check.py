"""Kernels that were just compiled for this GPU, held against the references before a run relies on them.

A compiler, a driver or a GPU that nobody has tried before must cost a line in the log, not a run. Small inputs, results
and gradients; the bound is a gross one, since the tests know the errors that rounding makes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalm.kernels.adamw.oracle import TorchAdamW
from megalm.kernels.alibi import alibi_slopes
from megalm.kernels.attention.baddbmm import BaddbmmAttention
from megalm.kernels.attention.suitability import AttentionUse
from megalm.kernels.bias_gelu.eager import bias_gelu
from megalm.kernels.bias_gelu.gated import torch_glu
from megalm.kernels.cross_entropy.torch_rows import TorchRows
from megalm.kernels.dropout_add.oracle import bias_dropout_add
from megalm.kernels.gelu_linear.oracle import TorchGeluLinear
from megalm.kernels.gradient_sum.oracle import TorchGradientSum
from megalm.kernels.layer_norm import oracle

BOUND = 0.05
"""Largest difference from the reference in fp32, over its largest value: several roundings to 8 bits of mantissa."""
EPSILON = 1e-5
SHARE_DROPPED = 0.25

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Demand:
    """What a run asks of its kernels, as far as a check depends on it."""

    dtype: torch.dtype | None = None
    """Of activations; by default bf16 on a GPU and fp32 elsewhere."""
    attention: AttentionUse | None = None
    hidden_size: int = 1024
    gate: str = "swiglu"
    drops: bool = False
    """Whether hidden states are dropped."""


class Draw:
    """Random tensors on the device. A GPU gets as many rows and positions as make programs go round their loops."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(17)
        on_gpu = device.type == "cuda"
        self._dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
        self._most_rows, self.num_positions = (20_011, 700) if on_gpu else (67, 150)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device).to(self._dtype)

    def num_rows(self, width: int) -> int:
        """Rows of a matrix that takes no more than 64 MiB in fp32."""
        return min(self._most_rows, 2**24 // width)

    @contextlib.contextmanager
    def seeded(self) -> Iterator[None]:
        """Kernels draw the same numbers in every such block, and the run's own streams stay where they are."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(17)
            yield


def failure(operation: str, kernel: Any, device: torch.device, *, demand: Demand | None = None) -> str | None:
    """What is wrong with a kernel of `operation` on `device`, in a few words; None if it gives the reference's numbers.

    Random streams are left as they are. Operations without a check pass.
    """
    check = _CHECKS.get(operation)
    if check is None:
        return None
    demand = demand or Demand()
    try:
        for name, got, wanted in check(kernel, Draw(device, demand.dtype), demand):
            difference = (got.float() - wanted.float()).abs().max().item()
            if not difference <= BOUND * max(wanted.float().abs().max().item(), EPSILON):
                return f"{name} differs from the reference by {difference:.3g}"
    except Exception as error:  # Whatever a compiler or a driver raises, the reference remains.
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    return None


Comparison = list[tuple[str, Tensor, Tensor]]
Check = Callable[[Any, Draw, Demand], Comparison]


def _attention(kernel: Any, draw: Draw, demand: Demand) -> Comparison:
    use = demand.attention
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

    found = _compared(ours, theirs, (mixed, draw(3 * n * d)), draw)
    if use is not None and use.dropout:
        found += _dropped_attention(kernel, draw, d, slopes)
    return found


def _dropped_attention(kernel: Any, draw: Draw, d: int, slopes: Tensor | None) -> Comparison:
    """d positions, whose weights come out as they are where the values are the identity: so the mask is seen."""
    b, n = 2, 4
    mixed = draw(d, b, n, 3, d)
    options: dict[str, Any] = {"slopes": slopes, "mask": None, "dropout": SHARE_DROPPED, "training": True}
    seen = mixed.clone()
    seen[:, :, :, 2] = torch.eye(d, device=mixed.device, dtype=mixed.dtype)[:, None, None]
    with draw.seeded():
        weights = kernel.from_fused(seen, **options, bias=None).view(d, b, n, d)
    kept = (weights != 0).permute(1, 2, 0, 3)  # [b, n, query, key]

    def ours(x: Tensor) -> Tensor:
        with draw.seeded():
            result: Tensor = kernel.from_fused(x, **options, bias=None)
        return result

    def theirs(x: Tensor) -> Tensor:
        q, k, v = (part.permute(1, 2, 0, 3) for part in x.unbind(3))  # [s, b, n, 3, d] -> 3 of [b, n, s, d]
        scores = q @ k.transpose(-1, -2) / math.sqrt(d)
        if slopes is not None:
            scores = scores + slopes[:, None, None] * torch.arange(d, device=x.device)
        hidden = torch.ones(d, d, dtype=torch.bool, device=x.device).triu(1)
        probabilities = scores.masked_fill(hidden, -math.inf).softmax(-1) * kept / (1.0 - SHARE_DROPPED)
        return (probabilities @ v).permute(2, 0, 1, 3).flatten(2)

    share = kept.float().sum() / (b * n * d * (d + 1) / 2)
    return [*_compared(ours, theirs, (mixed,), draw), _share_kept(share)]


def _share_kept(share: Tensor) -> tuple[str, Tensor, Tensor]:
    return "share that is kept", share, torch.full_like(share, 1.0 - SHARE_DROPPED)


def _layer_norm(kernel: Any, draw: Draw, demand: Demand) -> Comparison:
    from megalm.kernels.layer_norm.triton_norm import add_layer_norm, layer_norm_and_pass

    h = demand.hidden_size
    rows = draw.num_rows(h)
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


def _bias_gelu(kernel: Any, draw: Draw, demand: Demand) -> Comparison:
    return _compared(kernel, bias_gelu, (draw(draw.num_rows(512), 512), draw(512)), draw)


def _gelu_linear(kernel: Any, draw: Draw, demand: Demand) -> Comparison:
    """Both products as a run makes them, the whole [T, 4h] of some rows."""
    h = demand.hidden_size
    rows = min(draw.num_rows(4 * h), 2048)
    x, up, bias = draw(rows, h), draw(4 * h, h) / h**0.5, draw(4 * h)
    grad, down, inner = draw(rows, h), draw(h, 4 * h) / h**0.5, draw(rows, 4 * h)
    reference = TorchGeluLinear()
    got = *kernel.forward(x, up, bias), *kernel.backward(grad, down, inner)
    wanted = (
        *reference.forward(x.float(), up.float(), bias.float()),
        *reference.backward(grad.float(), down.float(), inner.float()),
    )
    names = ("result", "inner result", "gradient", "bias's gradient")
    return list(zip(names, got, wanted, strict=True))


def _glu(kernel: Any, draw: Draw, demand: Demand) -> Comparison:
    inputs = (draw(draw.num_rows(512), 512), draw(512))
    return _compared(kernel(demand.gate), torch_glu(demand.gate), inputs, draw)


def _head(kernel: Any, draw: Draw, demand: Demand) -> Comparison:
    """Rows of the whole vocabulary at once; statistics and gradient apart, as tensor-parallel ranks and fp16 take them;
    and the factors, on rows as wide as the hidden states."""
    logits, x = draw(9, 40_000), draw(9, demand.hidden_size)  # Kernels take long rows in several parts.
    labels = torch.arange(9, device=logits.device) * 4500
    elsewhere = torch.where(labels % 1000 == 0, labels, -1)
    weights = torch.linspace(0.5, 1.5, 9, device=logits.device)
    factors, factor = weights + 1.0, torch.full((), 0.75, device=logits.device)
    found = []
    for rows, wide in ((kernel, False), (TorchRows(), True)):
        values, apart, ours = (t.to(torch.float32 if wide else t.dtype, copy=True) for t in (logits, logits, x))
        peak, total = rows.statistics(values)
        log_sum, of_rows = rows.log_sum_and_gradient_(values, labels, weights, z_loss=1e-4)
        if of_rows is not None:
            values = values.float() * of_rows.unsqueeze(-1)
        rows.gradient_(apart, elsewhere, peak + total.log(), weights, z_loss=1e-4)
        scaled = rows.scaled(ours, factors)
        rows.scale_(ours, factor, factors)
        rows.scale_(scaled, factor)
        found.append((peak, total, log_sum, values, apart, scaled, ours))
    return [(f"part {at}", got, wanted) for at, (got, wanted) in enumerate(zip(*found, strict=True))]


def _gradient_sum(kernel: Any, draw: Draw, demand: Demand) -> Comparison:
    h = demand.hidden_size
    rows, gradient = draw(40, h), draw(60, h)
    ids = (torch.arange(40) * 7 % 13 - 1).to(rows.device)
    ours, theirs = (torch.ones(60, h, device=rows.device) for _ in range(2))
    for one, total in ((kernel, ours), (TorchGradientSum(), theirs)):
        one.add_(total.view(-1), gradient, factor=torch.full((), 0.25, device=rows.device))
        one.add_rows_(total, ids, rows)
    return [("sum", ours, theirs)]


def _adamw(kernel: Any, draw: Draw, demand: Demand) -> Comparison:
    """The second of two updates, clipped, with moments and rounded weights."""
    size = draw.num_rows(512) * 512 - 3
    master, first, second = (draw(size).float() for _ in range(3))
    factor = torch.full((), 4.0, device=draw.device)
    found = []
    for one in (kernel, TorchAdamW()):
        p, weight, step = master.clone(), torch.empty_like(master, dtype=torch.bfloat16), torch.zeros_like(factor)
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        for gradient, scale in ((first.clone(), None), (second.clone(), factor)):
            one.update_(
                p, gradient, weight, step=step, **moments,
                lr=0.1, betas=(0.9, 0.95), eps=EPSILON, weight_decay=0.1, factor=scale,
            )  # fmt: skip
        found.append((p - master, weight, gradient, step, *moments.values()))
    return [(f"part {at}", got, wanted) for at, (got, wanted) in enumerate(zip(*found, strict=True))]


def _dropout_add(kernel: Any, draw: Draw, demand: Demand) -> Comparison:
    """Without dropout; and with it, by what is kept of ones, as every kernel draws numbers of its own."""
    h = demand.hidden_size
    rows = draw.num_rows(h)
    inputs = (draw(rows, h), draw(h), draw(rows, h))
    ones, nothing = torch.ones_like(inputs[0]), (torch.zeros_like(inputs[1]), torch.zeros_like(inputs[2]))

    def kernel_with(prob: float, *given: Tensor) -> Tensor:
        with draw.seeded():
            result: Tensor = kernel(*given, prob, True)
        return result

    kept = kernel_with(SHARE_DROPPED, ones, *nothing) != 0

    def dropped(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return residual + (x + bias) * kept / (1.0 - SHARE_DROPPED)

    def whole(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return bias_dropout_add(x, bias, residual, 0.0, True)

    found = _compared(partial(kernel_with, 0.0), whole, inputs, draw)
    if demand.drops:
        found += [
            *_compared(partial(kernel_with, SHARE_DROPPED), dropped, inputs, draw),
            _share_kept(kept.float().mean()),
        ]
    return found


_CHECKS: dict[str, Check] = {
    "attention": _attention,
    "layer_norm": _layer_norm,
    "bias_gelu": _bias_gelu,
    "gelu_linear": _gelu_linear,
    "glu": _glu,
    "head": _head,
    "gradient_sum": _gradient_sum,
    "adamw": _adamw,
    "dropout_add": _dropout_add,
}


def _compared(kernel: Callable[..., Any], reference: Callable[..., Any], inputs: Results, draw: Draw) -> Comparison:
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

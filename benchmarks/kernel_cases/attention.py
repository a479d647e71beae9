#!/usr/bin/env python
"""Attention with ALiBi beside its peers: forward and backward, milliseconds, on whatever GPU there is.

    python benchmarks/kernel_cases/attention.py            the table of docs/performance.md
    python benchmarks/kernel_cases/attention.py --tune     the blocks of each kernel beside the shipped ones

`attention_cases` yields the same cases to benchmarks/kernels.py. All sides have the same inputs, separate contiguous
q, k and v, but for the line that says fused: there the trainer's fused projection goes in and its whole gradient comes
out, which costs the others a copy of 3 b s h elements each way. Peers are as fast as is known: bias and masks are built
before the clock starts, SDPA is given each of torch's kernels by name, FlexAttention is compiled for the exact shape.

The triton core skips blocks of keys that ALiBi makes vanish below half an ulp of fp32, so its time depends on slopes
and on the size of scores. "nothing skipped" is the same kernel with slopes too small to skip anything.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernel_cases.comparison import milliseconds

B, H, S = 4, 16, 2048


@dataclass(frozen=True)
class Case:
    """One side of one comparison."""

    operation: str
    shape: str
    side: str
    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    flops: float
    """Of forward and backward, causal half counted, nothing recomputed: 3.5 times the forward pass."""

    def forward_and_backward(self) -> None:
        """What is timed; gradients are made anew each time."""
        result = self.forward()
        torch.autograd.grad(result, self.inputs, torch.ones_like(result))


def attention_cases(device: torch.device, *, head_sizes: tuple[int, ...] = (128, 64)) -> Iterator[Case]:
    """The cases for every head size, in bf16, causal, with ALiBi but for those that say none."""
    for d in head_sizes:
        yield from _cases_of(d, device)


def _cases_of(d: int, device: torch.device) -> Iterator[Case]:
    from megalm.kernels.alibi import alibi_slopes
    from megalm.kernels.attention.bias_cache import CausalAlibiCache
    from megalm.kernels.attention.flex import FlexAttention
    from megalm.kernels.attention.triton_flash import TritonAttention

    generator = torch.Generator(device).manual_seed(0)
    mixed = torch.randn(S, B, H, 3, d, generator=generator, device=device, dtype=torch.bfloat16)
    q, k, v = (x.permute(1, 2, 0, 3).contiguous().requires_grad_() for x in mixed.unbind(3))
    mixed.requires_grad_()
    slopes = alibi_slopes(H).to(device)
    bias = CausalAlibiCache().get(slopes, S, torch.bfloat16)
    plain: dict[str, Any] = {"mask": None, "dropout": 0.0, "training": True}
    ours, flex, compiled = TritonAttention(), FlexAttention(), torch.compile(_matrix_products, dynamic=False)
    sides: dict[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]] = {
        "triton": (lambda: ours(q, k, v, slopes=slopes, **plain), (q, k, v)),
        "triton, fused projection": (lambda: ours.from_fused(mixed, slopes=slopes, **plain), (mixed,)),
        "triton, nothing skipped": (lambda: ours(q, k, v, slopes=slopes * 1e-6, **plain), (q, k, v)),
        "triton, no ALiBi": (lambda: ours(q, k, v, slopes=None, **plain), (q, k, v)),
        "baddbmm eager": (lambda: _matrix_products(q, k, v, bias), (q, k, v)),
        "baddbmm compiled": (lambda: compiled(q, k, v, bias), (q, k, v)),
        "FlexAttention": (lambda: flex(q, k, v, slopes=slopes, **plain), (q, k, v)),
        "SDPA with bias": (lambda: scaled_dot_product_attention(q, k, v, attn_mask=bias[None]), (q, k, v)),
    }
    for name, backend in {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}.items():
        sides[f"SDPA {name}, no ALiBi"] = (lambda backend=backend: _plain_sdpa(q, k, v, backend), (q, k, v))
    flops = 3.5 * 4 * B * H * S * S * d / 2
    for side, (forward, inputs) in sides.items():
        yield Case("attention", f"B{B} H{H} S{S} d{d}", side, forward, inputs, flops)


def _matrix_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """What transformers' Bloom computes: one baddbmm with the bias in bf16, softmax in fp32, one bmm."""
    b, n, s, d = q.shape
    q, k, v = (x.reshape(b * n, s, d) for x in (q, k, v))
    scores = torch.baddbmm(bias.repeat(b, 1, 1), q, k.transpose(1, 2), alpha=1.0 / math.sqrt(d))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights, v).view(b, n, s, d)


def _plain_sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def table(device: torch.device) -> None:
    """Print every case; one that fails says why."""
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, bf16, forward + backward")
    print("| shape | side | ms | forward ms | TFLOP/s |\n|---|---|---|---|---|")
    for case in attention_cases(device):
        try:
            both, forward = (milliseconds(run, device, rounds=20) for run in (case.forward_and_backward, case.forward))
        except Exception as failure:  # A peer that is absent or refuses must not end the table.
            print(f"| {case.shape} | {case.side} | {type(failure).__name__}: {str(failure)[:80]} | | |", flush=True)
            continue
        rate = case.flops / both / 1e9
        print(f"| {case.shape} | {case.side} | {both:.3f} | {forward:.3f} | {rate:.0f} |", flush=True)


def tune(device: torch.device) -> None:
    """Time each kernel with other blocks than the shipped ones, the others left alone; the shipped line comes first."""
    from megalm.kernels.attention import triton_launch
    from megalm.kernels.attention.triton_launch import Blocks, Cut

    shipped = triton_launch.cut_for
    choices = {
        "forward": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
        "query_gradient": ((64,), (32, 64), (4, 8), (2, 3, 4)),
        "key_value_gradient": ((16, 32, 64), (64, 128), (4, 8), (1, 2, 3, 4)),
    }
    for d in (128, 64):
        case = next(_cases_of(d, device))
        own: Cut = shipped(d, torch.bfloat16)
        for kernel, ranges in choices.items():
            cuts = [own]
            for numbers in itertools.product(*ranges):
                with contextlib.suppress(ValueError):  # Blocks that do not divide one another.
                    cuts.append(dataclasses.replace(own, **{kernel: Blocks(*numbers)}))
            for cut in cuts:
                triton_launch.cut_for = lambda *_, cut=cut, **__: cut  # type: ignore[assignment]
                try:
                    figure = f"{milliseconds(case.forward_and_backward, device, rounds=10):.3f} ms"
                except Exception as failure:  # Too much shared memory, mostly.
                    figure = f"{type(failure).__name__}: {str(failure)[:60]}"
                print(f"d{d} {kernel} {getattr(cut, kernel)}: {figure}", flush=True)
        triton_launch.cut_for = shipped


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="sweep the blocks of each kernel")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: the kernels' numbers are tested in Triton's interpreter, their speed is not", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    (tune if options.tune else table)(device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

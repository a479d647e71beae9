"""The operations of megalm beside torch eager, torch.compile and what else is installed, but for attention.

Bytes of forward and backward are those that must move: every input and gradient read once, every result written once,
in the dtype of the activations; vectors of one row are not counted. Sides that are compiled are compiled for the exact
shape, before the clock starts.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_cases.comparison import Comparison
from megalm.kernels.adamw.oracle import TorchAdamW
from megalm.kernels.bias_gelu import eager, jit
from megalm.kernels.bias_gelu.gated import bias_glu
from megalm.kernels.cross_entropy.torch_rows import TorchRows
from megalm.kernels.dropout_add import oracle as dropout_oracle
from megalm.kernels.gelu_linear import cublaslt
from megalm.kernels.gelu_linear.operations import BY_NAME
from megalm.kernels.layer_norm import apex_norm, oracle, torch_native
from megalm.kernels.linear import onednn
from megalm.kernels.linear.torch_native import TorchLinear
from megalm.kernels.rotary.oracle import rotary, rotary_angles
from megalm.kernels.softmax.oracle import scale_mask_softmax
from megalm.parallel.cross_entropy import vocab_parallel_cross_entropy
from megalm.parallel.head_loss import head_cross_entropy
from megalm.parallel.linear import gelu_mlp
from megalm.topology.group import SOLO

EPS = 1e-5
SUGGESTIONS = 4
"""Of cuBLASLt's heuristic that are timed; a run takes the first."""
Sides = dict[str, Callable[..., Any]]


def comparisons(device: torch.device) -> Iterator[Comparison]:
    """All of them, at the shapes of the table on a GPU and at small ones on a CPU."""
    gpu = device.type == "cuda"
    yield _head(device, *((8192, 250_880, 2048) if gpu else (1024, 4096, 128)))
    if not gpu:
        yield _head(device, 1024, 8192, 256)
    rows = 16_384 if gpu else 1024
    for width in (1024, 2048, 4096) if gpu else (128, 512):
        yield _layer_norm(device, rows, width)
        yield _add_layer_norm(device, rows, width)
    yield _bias_gelu(device, rows, 8192 if gpu else 512)
    yield _mlp(device, *((16_384, 2048) if gpu else (1024, 128)))
    if gpu:
        yield _mlp(device, 16_384, 1024)
    yield _gated(device, rows, 5440 if gpu else 512)
    yield _dropout_add(device, rows, 2048 if gpu else 128)
    yield _softmax(device, *((4, 16, 1024) if gpu else (2, 4, 128)))
    for clips in (False, True):
        yield _adamw(device, 2**28 if gpu else 2**20, clips=clips)
    yield _rotary(device, *((4, 16, 2048, 128) if gpu else (2, 4, 128, 32)))


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _compiled(function: Callable[..., Any], device: torch.device) -> Sides:
    # On a CPU compiling takes longer than the whole table.
    if device.type != "cuda":
        return {}
    return {"torch.compile": torch.compile(function, dynamic=False)}


def _triton(device: torch.device, module: str, name: str, *, side: str = "megalm triton") -> Sides:
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return {}
    return {side: getattr(importlib.import_module(f"megalm.kernels.{module}"), name)}


def _leaves(device: torch.device, *shapes: tuple[int, ...], scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    drawn = (scale * torch.randn(*shape, generator=generator, device=device) for shape in shapes)
    return tuple(values.to(_dtype(device)).requires_grad_() for values in drawn)


def _passes(number: int, device: torch.device, *sizes: int) -> float:
    elements = functools.reduce(lambda a, b: a * b, sizes)
    return float(number * elements * _dtype(device).itemsize)


def _head(device: torch.device, tokens: int, vocab: int, width: int) -> Comparison:
    kernel = onednn.OneDnnLinear() if device.type == "cpu" and onednn.is_faster_here() else TorchLinear()

    def make(num_tokens: int) -> tuple[Tensor, ...]:
        (x,) = _leaves(device, (num_tokens, width))
        (weight,) = _leaves(device, (vocab, width), scale=0.02)
        return x, weight

    def labels(x: Tensor) -> Tensor:
        return torch.arange(x.size(0), device=device) * 7919 % vocab

    def fused(rows: Any, x: Tensor, weight: Tensor) -> Tensor:
        weights = torch.full((x.size(0),), 1.0 / x.size(0), device=device)
        return head_cross_entropy(x, weight, labels(x), weights, tp=SOLO, rows=rows, kernel=kernel)

    def in_full(x: Tensor, weight: Tensor) -> Tensor:
        return functional.cross_entropy(functional.linear(x, weight).to(_wide(x)), labels(x))

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        logits = functional.linear(x, weight)
        return vocab_parallel_cross_entropy(logits[:, None], labels(x)[:, None], tp=SOLO).mean()

    sides: Sides = {
        **{side: functools.partial(fused, rows()) for side, rows in
           _triton(device, "cross_entropy.triton_rows", "TritonRows").items()},
        "megalm chunked": functools.partial(fused, TorchRows()),
        "megalm reference": reference,
        "torch eager": in_full,
        **_compiled(in_full, device),
    }  # fmt: skip
    if importlib.util.find_spec("liger_kernel") is not None and device.type == "cuda":
        liger = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")

        def liger_loss(x: Tensor, weight: Tensor) -> Tensor:
            loss: Tensor = liger.LigerFusedLinearCrossEntropyFunction.apply(x, weight, labels(x))[0]
            return loss

        sides["Liger"] = liger_loss
    shape = f"{tokens} x {vocab}, h {width}"
    return Comparison("head + cross-entropy", shape, tokens, make, sides, in_full, flops=6.0 * tokens * vocab * width)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _layer_norm(device: torch.device, rows: int, width: int) -> Comparison:
    def make(num_rows: int) -> tuple[Tensor, ...]:
        return _leaves(device, (num_rows, width), (width,), (width,))

    def native(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch_native.layer_norm(x, weight, bias, EPS)

    def written_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return oracle.layer_norm(x, weight, bias, EPS)

    sides: Sides = {
        side: (lambda x, weight, bias, f=f: f(x, weight, bias, EPS))
        for side, f in _triton(device, "layer_norm.triton_norm", "layer_norm").items()
    }
    sides |= {"torch": native, "cast to fp32, eager": written_out, **_compiled(written_out, device)}
    if apex_norm.obstacle(device) is None:
        sides["apex"] = lambda x, weight, bias: apex_norm.layer_norm(x, weight, bias, EPS)
    if importlib.util.find_spec("liger_kernel") is not None and device.type == "cuda":
        liger = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
        sides["Liger"] = lambda x, weight, bias: liger.apply(x, weight, bias, EPS)
    moved = _passes(5, device, rows, width)
    return Comparison("LayerNorm", f"{rows} x {width}", rows, make, sides, written_out, moved_bytes=moved)


def _add_layer_norm(device: torch.device, rows: int, width: int) -> Comparison:
    def make(num_rows: int) -> tuple[Tensor, ...]:
        return _leaves(device, (num_rows, width), (width,), (num_rows, width), (width,), (width,))

    def written_out(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return oracle.add_layer_norm(*inputs, EPS)

    def apart(x: Tensor, bias: Tensor, residual: Tensor, *norm: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + (x + bias)
        return total, torch_native.layer_norm(total, *norm, EPS)

    sides: Sides = {
        side: (lambda *inputs, f=f: f(*inputs, EPS))
        for side, f in _triton(device, "layer_norm.triton_norm", "add_layer_norm").items()
    }
    sides |= {"torch": apart, **_compiled(apart, device)}
    moved = _passes(8, device, rows, width)  # 2 read and 2 written; 3 read and 1 written.
    return Comparison("bias + add + LayerNorm", f"{rows} x {width}", rows, make, sides, written_out, moved_bytes=moved)


def _bias_gelu(device: torch.device, rows: int, width: int) -> Comparison:
    def make(num_rows: int) -> tuple[Tensor, ...]:
        return _leaves(device, (num_rows, width), (width,))

    sides: Sides = _triton(device, "bias_gelu.triton_activation", "bias_gelu")
    sides |= {"torch": eager.bias_gelu, "TorchScript": jit.bias_gelu_jit, **_compiled(eager.bias_gelu, device)}
    moved = _passes(5, device, rows, width)
    return Comparison("bias + GELU", f"{rows} x {width}", rows, make, sides, eager.bias_gelu, moved_bytes=moved)


def _mlp(device: torch.device, rows: int, width: int) -> Comparison:
    """Both products of an MLP and its GELU, without the last bias."""

    def make(num_rows: int) -> tuple[Tensor, ...]:
        (x, bias) = _leaves(device, (num_rows, width), (4 * width,))
        return x, *_leaves(device, (4 * width, width), (width, 4 * width), scale=width**-0.5), bias

    def apart(activation: Callable[..., Any], x: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = functional.linear(activation(functional.linear(x, up), bias), down)
        return y

    def inside(kernel: str, x: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        return gelu_mlp(x, up, bias, down, kernel=kernel)

    sides: Sides = {
        side: functools.partial(apart, f)
        for side, f in _triton(device, "bias_gelu.triton_activation", "bias_gelu", side="megalm separate").items()
    }
    if device.type == "cuda" and cublaslt.obstacle(device) is None:
        timed = {
            f"cublaslt, suggestion {choice + 1}": cublaslt.CublasLtGeluLinear(choice=choice)
            for choice in range(SUGGESTIONS)
        } | {"cublaslt, bias's gradient apart": cublaslt.CublasLtGeluLinear(sums_bias=False)}
        BY_NAME.update(timed)
        sides |= {f"megalm {name}": functools.partial(inside, name) for name in timed}
    written_out = functools.partial(apart, eager.bias_gelu)
    sides |= {
        "megalm torch": functools.partial(inside, "torch"),
        "torch": written_out,
        **_compiled(written_out, device),
    }
    operations = 6.0 * rows * 2 * width * 4 * width
    return Comparison("MLP", f"{rows} x {width}", rows, make, sides, written_out, flops=operations)


def _gated(device: torch.device, rows: int, width: int) -> Comparison:
    def make(num_rows: int) -> tuple[Tensor, ...]:
        return _leaves(device, (num_rows, 2 * width), (2 * width,))

    def written_out(x: Tensor, bias: Tensor) -> Tensor:
        return bias_glu(x, bias, "swiglu")

    sides: Sides = {
        side: build("swiglu") for side, build in _triton(device, "bias_gelu.triton_activation", "TritonGlu").items()
    }
    sides |= {"torch": written_out, **_compiled(written_out, device)}
    moved = _passes(8, device, rows, width)  # 2 read and 1 written; 3 read and 2 written.
    return Comparison("bias + SwiGLU", f"{rows} x {width}", rows, make, sides, written_out, moved_bytes=moved)


def _dropout_add(device: torch.device, rows: int, width: int) -> Comparison:
    def make(num_rows: int) -> tuple[Tensor, ...]:
        return _leaves(device, (num_rows, width), (width,), (num_rows, width))

    def dropped(f: Callable[..., Any], x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        result: Tensor = f(x, bias, residual, 0.1, True)
        return result

    forms = {**_triton(device, "dropout_add.triton_dropout", "bias_dropout_add")}
    forms["torch"] = dropout_oracle.bias_dropout_add
    sides: Sides = {side: functools.partial(dropped, f) for side, f in forms.items()}
    sides |= _compiled(functools.partial(dropped, dropout_oracle.bias_dropout_add), device)
    moved = _passes(5, device, rows, width)  # 2 read and 1 written; 1 read and 1 written.
    return Comparison("bias + dropout + add", f"{rows} x {width}", rows, make, sides, None, moved_bytes=moved)


def _adamw(device: torch.device, size: int, *, clips: bool) -> Comparison:
    """fp32 masters, moments and sums and bf16 weights, on CPUs too. After the first round the sums are 0."""
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    factor = torch.full((), 2.0, device=device) if clips else None

    def make(num_elements: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)
        master, gradient, mean, square = (
            torch.randn(num_elements, generator=generator, device=device) for _ in range(4)
        )
        return master, gradient, master.bfloat16(), torch.full((), 10.0, device=device), mean, square.square_()

    def updated(kernel: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        master, gradient, weight, step, mean, square = inputs
        moments = {"exp_avg": mean, "exp_avg_sq": square}
        kernel.update_(master, gradient, weight, step=step, **moments, **options, factor=factor)
        return master, mean, square

    def written_out(master: Tensor, gradient: Tensor, _: Tensor, step: Tensor, *moments: Tensor) -> tuple[Tensor, ...]:
        g = gradient if factor is None else gradient / factor
        terms = zip(options["betas"], moments, (g, g * g), strict=True)
        mean, square = (beta * moment + (1 - beta) * term for beta, moment, term in terms)
        corrected, corrected_square = (
            moment / (1 - beta ** (step + 1)) for beta, moment in zip(options["betas"], (mean, square), strict=True)
        )
        change = options["lr"] * corrected / (corrected_square.sqrt() + options["eps"])
        return (1 - options["lr"] * options["weight_decay"]) * master - change, mean, square

    sides: Sides = {
        side: functools.partial(updated, kernel())
        for side, kernel in _triton(device, "adamw.triton_adamw", "TritonAdamW").items()
    }
    sides["torch fused + copy + zero_"] = functools.partial(updated, TorchAdamW())
    name, shape = "AdamW, clipping" if clips else "AdamW", f"{size} parameters"
    return Comparison(name, shape, size, make, sides, written_out, moved_bytes=34.0 * size, in_place=True)


def _softmax(device: torch.device, batch: int, heads: int, keys: int) -> Comparison:
    mask = torch.ones(keys, keys, dtype=torch.bool, device=device).triu(1)
    scale = 0.125

    def make(num_rows: int) -> tuple[Tensor, ...]:
        return _leaves(device, (max(1, num_rows // (heads * keys)), heads, keys, keys))

    def written_out(scores: Tensor) -> Tensor:
        return scale_mask_softmax(scores, mask, scale=scale)

    sides: Sides = {
        side: (lambda scores, f=f: f(scores, mask, scale=scale))
        for side, f in _triton(device, "softmax.triton_softmax", "scale_mask_softmax").items()
    }
    sides |= {"torch": written_out, **_compiled(written_out, device)}
    rows = batch * heads * keys
    shape = f"{batch} x {heads} x {keys} x {keys}"
    moved = _passes(5, device, rows, keys)
    return Comparison("scale + mask + softmax", shape, rows, make, sides, written_out, moved_bytes=moved)


def _rotary(device: torch.device, batch: int, heads: int, positions: int, size: int) -> Comparison:
    angles = rotary_angles(positions, size, device=device)

    def make(num_rows: int) -> tuple[Tensor, ...]:
        return _leaves(device, (max(1, num_rows // (heads * positions)), heads, positions, size))

    def written_out(x: Tensor) -> Tensor:
        return rotary(x, angles.to(_wide(x)))

    sides: Sides = {
        side: (lambda x, f=f: f(x, angles)) for side, f in _triton(device, "rotary.triton_rotary", "rotary").items()
    }
    sides |= {"torch": written_out, **_compiled(written_out, device)}
    rows = batch * heads * positions
    shape = f"{batch} x {heads} x {positions} x {size}"
    moved = _passes(4, device, rows, size)
    return Comparison("rotary", shape, rows, make, sides, written_out, moved_bytes=moved)

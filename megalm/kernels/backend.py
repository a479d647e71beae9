"""Which implementation of an operation a run uses, chosen once when the model is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megalm.errors import KernelError
from megalm.kernels import self_check
from megalm.kernels.adamw.oracle import TorchAdamW
from megalm.kernels.attention.baddbmm import BaddbmmAttention
from megalm.kernels.attention.sdpa import SdpaAttention
from megalm.kernels.attention.suitability import (
    AttentionUse,
    flex_misfit,
    flex_obstacle,
    preferred_core,
    triton_misfit,
    triton_obstacle,
)
from megalm.kernels.bias_gelu import eager, jit
from megalm.kernels.bias_gelu.gated import torch_glu
from megalm.kernels.cpu import multiplies_faster_in_fp32
from megalm.kernels.cross_entropy.torch_rows import TorchRows
from megalm.kernels.dropout_add.oracle import bias_dropout_add
from megalm.kernels.gelu_linear import cublaslt
from megalm.kernels.gelu_linear.operations import BY_NAME as GELU_LINEAR_BY_NAME
from megalm.kernels.gradient_sum.oracle import TorchGradientSum
from megalm.kernels.layer_norm import apex_norm, oracle, torch_native
from megalm.kernels.layer_norm.protocol import AddLayerNormKernel, LayerNormAndPassKernel
from megalm.kernels.linear import fp8, onednn, widened
from megalm.kernels.linear.torch_native import TorchLinear
from megalm.kernels.triton_support import triton_missing


@dataclass(frozen=True)
class Choice:
    """An implementation, its name and why it was taken; the caller logs the last two."""

    name: str
    implementation: Any
    reason: str


class Verdict(NamedTuple):
    """Whether a kernel that was tried on this device is to be taken, and why, in words for the log."""

    is_better: bool
    reason: str


@dataclass(frozen=True)
class _Candidate:
    build: Callable[[], Any]
    obstacle: Callable[[torch.device], str | None]
    misfit: Callable[[AttentionUse], str | None] | None = None
    """Why it cannot serve a model although it runs on the device."""


def _triton_attention() -> Any:
    from megalm.kernels.attention.triton_flash import TritonAttention

    return TritonAttention()


def _flex_attention() -> Any:
    from megalm.kernels.attention.flex import FlexAttention

    return FlexAttention()


def _no_obstacle(device: torch.device) -> str | None:
    return None


def _jit_obstacle(device: torch.device) -> str | None:
    failure = jit.scripting_failure()
    return None if failure is None else f"TorchScript does not work here ({failure})"


def _triton_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "Triton compiles for GPUs"
    return triton_missing()


def _triton_layer_norm() -> Any:
    from megalm.kernels.layer_norm.triton_norm import layer_norm

    return layer_norm


def _triton_bias_gelu() -> Any:
    from megalm.kernels.bias_gelu.triton_activation import bias_gelu

    return bias_gelu


def _triton_glu() -> Any:
    from megalm.kernels.bias_gelu.triton_activation import TritonGlu

    return TritonGlu


def _triton_dropout_add() -> Any:
    from megalm.kernels.dropout_add.triton_dropout import bias_dropout_add as in_one_pass

    return in_one_pass


def _triton_rows() -> Any:
    from megalm.kernels.cross_entropy.triton_rows import TritonRows

    return TritonRows()


def _triton_gradient_sum() -> Any:
    from megalm.kernels.gradient_sum.triton_sum import TritonGradientSum

    return TritonGradientSum()


def _triton_adamw() -> Any:
    from megalm.kernels.adamw.triton_adamw import TritonAdamW

    return TritonAdamW()


_CANDIDATES: dict[str, dict[str, _Candidate]] = {
    "attention": {
        "baddbmm": _Candidate(BaddbmmAttention, _no_obstacle),
        "sdpa": _Candidate(SdpaAttention, _no_obstacle),
        "triton": _Candidate(_triton_attention, triton_obstacle, triton_misfit),
        "flex": _Candidate(_flex_attention, flex_obstacle, flex_misfit),
    },
    "layer_norm": {
        "reference": _Candidate(lambda: oracle.layer_norm, _no_obstacle),
        "torch": _Candidate(lambda: torch_native.layer_norm, _no_obstacle),
        "triton": _Candidate(_triton_layer_norm, _triton_obstacle),
        "apex": _Candidate(lambda: apex_norm.layer_norm, apex_norm.obstacle),
    },
    "bias_gelu": {
        "torch": _Candidate(lambda: eager.bias_gelu, _no_obstacle),
        "jit": _Candidate(lambda: jit.bias_gelu_jit, _jit_obstacle),
        "triton": _Candidate(_triton_bias_gelu, _triton_obstacle),
    },
    "gelu_erf": {"torch": _Candidate(lambda: eager.bias_gelu_erf, _no_obstacle)},
    # Functions from the name of a gate to the kernel; output.bias_gelu names them and the erf GELU too.
    "glu": {
        "torch": _Candidate(lambda: torch_glu, _no_obstacle),
        "triton": _Candidate(_triton_glu, _triton_obstacle),
    },
    # The GELU inside the MLP's products, or None: bias_gelu between them.
    "gelu_linear": {
        "separate": _Candidate(lambda: None, _no_obstacle),
        "torch": _Candidate(lambda: GELU_LINEAR_BY_NAME["torch"], _no_obstacle),
        "cublaslt": _Candidate(lambda: GELU_LINEAR_BY_NAME["cublaslt"], cublaslt.obstacle),
    },
    "dropout_add": {
        "torch": _Candidate(lambda: bias_dropout_add, _no_obstacle),
        "triton": _Candidate(_triton_dropout_add, _triton_obstacle),
    },
    "head": {
        "reference": _Candidate(lambda: None, _no_obstacle),
        "chunked": _Candidate(TorchRows, _no_obstacle),
        "triton": _Candidate(_triton_rows, _triton_obstacle),
    },
    "gradient_sum": {
        "torch": _Candidate(TorchGradientSum, _no_obstacle),
        "triton": _Candidate(_triton_gradient_sum, _triton_obstacle),
    },
    "adamw": {
        "torch": _Candidate(TorchAdamW, _no_obstacle),
        "triton": _Candidate(_triton_adamw, _triton_obstacle),
    },
    "linear": {
        "torch": _Candidate(TorchLinear, _no_obstacle),
        "onednn": _Candidate(onednn.OneDnnLinear, onednn.obstacle),
        "fp32": _Candidate(widened.Fp32Linear, _no_obstacle),
        "fp8": _Candidate(fp8.Fp8Linear, fp8.obstacle),
        "fp8_e4m3": _Candidate(lambda: fp8.Fp8Linear(gradient_format=fp8.E4M3), fp8.obstacle),
    },
}


RUNS_EVERYWHERE = {
    "attention": "sdpa",
    "layer_norm": "torch",
    "bias_gelu": "torch",
    "gelu_erf": "torch",
    "glu": "torch",
    "gelu_linear": "separate",
    "dropout_add": "torch",
    "head": "chunked",
    "gradient_sum": "torch",
    "adamw": "torch",
    "linear": "torch",
}
"""What an operation takes where the best that there is does not run, or not on every rank."""

CHALLENGERS = {"gelu_linear": "cublaslt", "adamw": "triton"}
"""Implementations that `auto` takes only where a contest on this device finds them better."""

COMPILED_HERE = ("triton", "flex")
"""Implementations that `auto` takes only if they pass `self_check`."""


def choose(
    operation: str,
    requested: str,
    device: torch.device,
    *,
    use: AttentionUse | None = None,
    drops: bool = False,
    dtype: torch.dtype | None = None,
    hidden_size: int = 1024,
    gate: str = "swiglu",
    contest: Callable[[], Verdict] | None = None,
) -> Choice:
    """The implementation of an operation (attention, layer_norm, ...) that `requested` names, or `auto` finds best.

    Build one choice and share it between the layers: an attention core caches its bias. `use` is what the model asks of
    its attention core; without it, `auto` takes one that serves every model. `drops` tells whether dropout_add has
    anything to drop, `dtype` what activations are; with the hidden size and the gate they decide what is checked.
    `contest` tries the operation's challenger; without one, `auto` does not take it.

    Raises: KernelError if `requested` is not known or cannot run on `device`, or cannot serve the model.
    """
    candidates = _CANDIDATES[operation]
    if requested == "auto":
        name, reason = _preference(operation, device, use, drops, dtype)
        if contest is not None:
            challenger = CHALLENGERS[operation]
            verdict = contest()
            name, reason = challenger if verdict.is_better else name, f"{challenger}: {verdict.reason}"
        implementation = candidates[name].build()
        if name in COMPILED_HERE:
            demand = self_check.Demand(dtype, use, hidden_size, gate, drops)
            wrong = self_check.failure(operation, implementation, device, demand=demand)
            if wrong is not None:
                fallback = RUNS_EVERYWHERE[operation]
                return Choice(fallback, candidates[fallback].build(), f"{name} failed its check on this GPU: {wrong}")
        return Choice(name, implementation, reason)
    field = "output.bias_gelu" if operation in ("glu", "gelu_erf") else f"output.{operation}"
    remedy = f"  implementations that work here: {', '.join(_usable(operation, device, use))}"
    if requested not in candidates:
        raise KernelError(f"{field} = {requested!r} is not an implementation of {operation}\n{remedy}")
    obstacle = _obstacle(candidates[requested], device, use)
    if obstacle is not None:
        raise KernelError(f"{field} = {requested!r} cannot run on {device}: {obstacle}\n{remedy}")
    return Choice(requested, candidates[requested].build(), "asked for by name")


def choose_add_layer_norm(layer_norm: str) -> AddLayerNormKernel | None:
    """The addition and LayerNorm in one that belongs to a LayerNorm implementation; None where there is none."""
    if layer_norm != "triton":
        return None
    from megalm.kernels.layer_norm.triton_norm import add_layer_norm

    return add_layer_norm


def choose_layer_norm_and_pass(layer_norm: str) -> LayerNormAndPassKernel | None:
    """The LayerNorm beside a residual stream that belongs to a LayerNorm implementation; None where there is none."""
    if layer_norm != "triton":
        return None
    from megalm.kernels.layer_norm.triton_norm import layer_norm_and_pass

    return layer_norm_and_pass


def obstacle_of(operation: str, name: str, device: torch.device) -> str | None:
    """Why an implementation cannot run on `device`, or None."""
    return _CANDIDATES[operation][name].obstacle(device)


def _obstacle(candidate: _Candidate, device: torch.device, use: AttentionUse | None) -> str | None:
    misfit = candidate.misfit(use) if candidate.misfit is not None and use is not None else None
    return candidate.obstacle(device) or misfit


def _usable(operation: str, device: torch.device, use: AttentionUse | None) -> list[str]:
    candidates = _CANDIDATES[operation].items()
    return ["auto", *(name for name, candidate in candidates if _obstacle(candidate, device, use) is None)]


def _preference(
    operation: str, device: torch.device, use: AttentionUse | None, drops: bool, dtype: torch.dtype | None
) -> tuple[str, str]:
    if operation == "linear":
        if multiplies_faster_in_fp32(device, dtype):
            return "fp32", "this processor has no fast products of 16 bits"
        if onednn.obstacle(device) is None and onednn.is_faster_here():
            return "onednn", "MKL leaves half of this processor's vector width unused, oneDNN does not"
        return "torch", "torch's own matrix products"
    if operation == "gelu_linear":
        return "separate", "products with the GELU inside are taken where they are measured to be faster"
    if operation == "gelu_erf":
        return "torch", "the erf GELU has one implementation"
    if operation == "head":
        if _triton_obstacle(device) is None:
            return (
                "triton",
                "the logits of all tokens are never in memory, those of some become their gradient in one pass",
            )
        return "chunked", "the logits of all tokens are never in memory"
    if operation == "adamw":
        return "torch", "torch's fused AdamW; one pass is taken where it is measured to be faster"
    if operation == "attention":
        return preferred_core(device, use)
    obstacle = _triton_obstacle(device)
    on_gpu = obstacle is None
    if operation == "layer_norm":
        if on_gpu:
            return "triton", "one pass each way, with the addition before it and the weight gradients inside"
        return "torch", "torch's kernel keeps fp32 statistics and is faster than separate operations"
    if operation == "gradient_sum":
        if on_gpu:
            return "triton", "16-bit gradients are added to fp32 sums in one pass, embeddings row by row"
        return "torch", "torch's own additions"
    if operation == "dropout_add":
        if not drops:
            return "torch", "without dropout there is nothing to fuse; torch.compile fuses what there is with it"
        if on_gpu:
            return "triton", "one pass each way without a mask in memory, with the bias gradient inside"
        return "torch", f"separate operations; {obstacle}"
    if on_gpu:
        return "triton", "one pass each way, with the bias gradient inside"
    if operation == "glu":
        return "torch", f"separate operations; {obstacle}"
    if device.type == "cpu":
        return "torch", "TorchScript does not fuse on a CPU; torch's GELU is one kernel"
    failure = _jit_obstacle(device)
    if failure is not None:
        return "torch", failure
    return "jit", "TorchScript fuses bias and GELU on this device and keeps no intermediate"

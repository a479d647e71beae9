"""Compiled kernels pass their check, wrong ones fail it by name, and `auto` then takes the next best."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.kernels import backend, self_check
from megalm.kernels.adamw.oracle import TorchAdamW
from megalm.kernels.attention.baddbmm import BaddbmmAttention
from megalm.kernels.attention.suitability import AttentionUse
from megalm.kernels.backend import choose
from megalm.kernels.bias_gelu.eager import bias_gelu
from megalm.kernels.bias_gelu.gated import torch_glu
from megalm.kernels.cross_entropy.torch_rows import TorchRows
from megalm.kernels.dropout_add.oracle import bias_dropout_add
from megalm.kernels.self_check import Demand
from tests.support.triton_device import ABSENT, INSTALLED

CPU = torch.device("cpu")
BLOOM = AttentionUse(alibi=True, head_size=64, dtype=torch.bfloat16)
needs_triton = pytest.mark.skipif(not INSTALLED, reason=ABSENT)


DROPPED = Demand(attention=replace(BLOOM, dropout=True), drops=True)
BY_OPERATION = {
    "attention": [Demand(attention=replace(BLOOM, documents=True)), DROPPED],
    "layer_norm": [Demand(), Demand(torch.bfloat16, hidden_size=96)],
    "bias_gelu": [Demand(), Demand(torch.float16)],
    "glu": [Demand(gate=gate) for gate in ("geglu", "swiglu", "reglu", "liglu")],
    "dropout_add": [Demand(hidden_size=96), DROPPED],
    "head": [Demand(hidden_size=96), Demand(torch.float16)],
    "adamw": [Demand()],
    "gradient_sum": [Demand(), Demand(torch.bfloat16, hidden_size=96)],
}


@needs_triton
@pytest.mark.parametrize("operation", [name for name, kinds in backend._CANDIDATES.items() if "triton" in kinds])
def test_every_triton_kernel_passes(operation: str, triton_device: torch.device) -> None:
    kernel = backend._CANDIDATES[operation]["triton"].build()
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if triton_device.type == "cuda" else [])]
    for demand in BY_OPERATION[operation]:
        assert self_check.failure(operation, kernel, triton_device, demand=demand) is None, demand
    assert torch.equal(torch.get_rng_state(), states[0])
    if triton_device.type == "cuda":
        assert torch.equal(torch.cuda.get_rng_state(), states[1])


class DropsTheScale(BaddbmmAttention):
    """Attention whose values come out too large."""

    def from_fused(self, mixed: Tensor, **options: Any) -> Tensor:
        return 1.1 * super().from_fused(mixed, **options)


class LeavesTheLabel(TorchRows):
    """Gradients that forget which column is the label."""

    def log_sum_and_gradient_(
        self, logits: Tensor, labels: Tensor, weights: Tensor, *, z_loss: float
    ) -> tuple[Tensor, Tensor | None]:
        return super().log_sum_and_gradient_(logits, torch.full_like(labels, -1), weights, z_loss=z_loss)


class LeavesTheFactors(TorchRows):
    """Rows of the hidden states that are not multiplied by their factors."""

    def scaled(self, x: Tensor, factors: Tensor) -> Tensor:
        return x.clone()


class LeavesTheWeights(TorchRows):
    """The gradient on tensor-parallel ranks as if every token had the same weight."""

    def gradient_(self, logits: Tensor, labels: Tensor, log_sum: Tensor, weights: Tensor, *, z_loss: float) -> None:
        super().gradient_(logits, labels, log_sum, torch.ones_like(weights), z_loss=z_loss)


class DropsAnew(BaddbmmAttention):
    """Gradients through another mask than the forward's."""

    def from_fused(self, mixed: Tensor, **options: Any) -> Tensor:
        first = super().from_fused(mixed.detach(), **options)
        second = super().from_fused(mixed, **options)
        return second + (first - second).detach()


class AddsNothingWhereItDrops:
    """A mask for the result and none for the gradients."""

    def __call__(self, x: Tensor, bias: Tensor, residual: Tensor, prob: float, training: bool) -> Tensor:
        whole = x + bias
        return residual + whole + (torch.nn.functional.dropout(whole, prob, training) - whole).detach()


class LeavesTheFactor(TorchAdamW):
    """An update that does not clip."""

    def update_(self, master: Tensor, gradient: Tensor, weight: Tensor, **options: Any) -> None:
        super().update_(master, gradient, weight, **{**options, "factor": None})


def raises(*_: Any) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


@pytest.mark.parametrize(
    "operation, kernel, demand, said",
    [
        ("attention", DropsTheScale(), Demand(), "result 0 differs from the reference by"),
        ("attention", DropsAnew(), DROPPED, "gradient 0 differs from the reference by"),
        ("head", LeavesTheLabel(), Demand(), "part 3 differs from the reference by"),
        ("head", LeavesTheWeights(), Demand(), "part 4 differs from the reference by"),
        ("head", LeavesTheFactors(), Demand(), "part 5 differs from the reference by"),
        ("bias_gelu", lambda x, bias: bias_gelu(x, bias).detach() + 0.0 * (x + bias), Demand(), "gradient 0 differs"),
        ("bias_gelu", raises, Demand(), "RuntimeError: no kernel image is available"),
        ("bias_gelu", lambda x, bias: bias_gelu(x, bias) * float("nan"), Demand(), "differs from the reference by nan"),
        ("glu", lambda gate: torch_glu("reglu"), Demand(), "differs from the reference by"),
        ("glu", lambda gate: torch_glu("swiglu"), Demand(gate="geglu"), "differs from the reference by"),
        ("dropout_add", AddsNothingWhereItDrops(), DROPPED, "gradient 0 differs from the reference by"),
        ("adamw", LeavesTheFactor(), Demand(), "part 0 differs from the reference by"),
    ],
    ids=[
        "scale",
        "mask",
        "label",
        "weights",
        "factors",
        "gradient",
        "raises",
        "nan",
        "gate",
        "this gate",
        "dropped",
        "clipping",
    ],
)
def test_a_wrong_kernel_fails_with_what_is_wrong(operation: str, kernel: Any, demand: Demand, said: str) -> None:
    assert said in str(self_check.failure(operation, kernel, CPU, demand=demand))


def test_references_pass() -> None:
    assert self_check.failure("attention", BaddbmmAttention(), CPU, demand=DROPPED) is None
    assert self_check.failure("dropout_add", bias_dropout_add, CPU, demand=DROPPED) is None
    assert self_check.failure("bias_gelu", bias_gelu, CPU) is None
    assert self_check.failure("head", TorchRows(), CPU) is None


def test_auto_takes_the_next_best_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_preference", lambda *_: ("triton", "fastest"))
    monkeypatch.setattr(self_check, "failure", lambda *_, **__: "result 0 differs from the reference by 3")
    choice = choose("layer_norm", "auto", CPU)
    assert choice.name == "torch"
    assert choice.reason == "triton failed its check on this GPU: result 0 differs from the reference by 3"
    monkeypatch.setattr(self_check, "failure", lambda *_, **__: None)
    assert choose("layer_norm", "auto", CPU).reason == "fastest"

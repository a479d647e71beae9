"""Compiled kernels pass their check, wrong ones fail it by name, and `auto` then takes the next best."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.kernels import backend, self_check
from megalm.kernels.attention.baddbmm import BaddbmmAttention
from megalm.kernels.attention.suitability import AttentionUse
from megalm.kernels.backend import choose
from megalm.kernels.bias_gelu.eager import bias_gelu
from megalm.kernels.bias_gelu.gated import torch_glu
from megalm.kernels.cross_entropy.torch_rows import TorchRows
from tests.support.triton_device import INSTALLED

CPU = torch.device("cpu")
BLOOM = AttentionUse(alibi=True, head_size=64, dtype=torch.bfloat16)
needs_triton = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize("operation", [name for name, kinds in backend._CANDIDATES.items() if "triton" in kinds])
def test_every_triton_kernel_passes(operation: str, triton_device: torch.device) -> None:
    kernel = backend._CANDIDATES[operation]["triton"].build()
    uses = [BLOOM, replace(BLOOM, documents=True)] if operation == "attention" else [None]
    state = torch.get_rng_state()
    for use in uses:
        assert self_check.failure(operation, kernel, triton_device, use=use) is None
    assert torch.equal(torch.get_rng_state(), state)


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


def raises(*_: Any) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


@pytest.mark.parametrize(
    "operation, kernel, said",
    [
        ("attention", DropsTheScale(), "result 0 differs from the reference by"),
        ("head", LeavesTheLabel(), "part 3 differs from the reference by"),
        ("bias_gelu", lambda x, bias: bias_gelu(x, bias).detach() + 0.0 * (x + bias), "gradient 0 differs"),
        ("bias_gelu", raises, "RuntimeError: no kernel image is available"),
        ("bias_gelu", lambda x, bias: bias_gelu(x, bias) * float("nan"), "result 0 differs from the reference by nan"),
        ("glu", lambda gate: torch_glu("reglu"), "differs from the reference by"),
    ],
    ids=["scale", "label", "gradient", "raises", "nan", "gate"],
)
def test_a_wrong_kernel_fails_with_what_is_wrong(operation: str, kernel: Any, said: str) -> None:
    assert said in str(self_check.failure(operation, kernel, CPU))


def test_references_pass() -> None:
    assert self_check.failure("attention", BaddbmmAttention(), CPU, use=BLOOM) is None
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

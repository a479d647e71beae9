"""The choice of implementations."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megalm.errors import KernelError
from megalm.kernels import backend, self_check
from megalm.kernels.bias_gelu import jit
from tests.support.triton_device import ABSENT, INSTALLED

CPU = torch.device("cpu")
OPERATIONS = ["attention", "layer_norm", "bias_gelu", "head", "dropout_add", "adamw"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_auto_names_its_pick_and_the_reason(operation: str) -> None:
    choice = backend.choose(operation, "auto", CPU)
    assert choice.name != "auto"
    assert choice.reason
    assert choice.implementation is not None


@pytest.mark.parametrize(
    "operation, name",
    [
        ("attention", "baddbmm"),
        ("attention", "sdpa"),
        ("layer_norm", "reference"),
        ("layer_norm", "torch"),
        ("bias_gelu", "torch"),
        ("bias_gelu", "jit"),
        ("glu", "torch"),
        ("gelu_erf", "torch"),
        ("head", "reference"),
        ("head", "chunked"),
        ("linear", "fp32"),
        ("dropout_add", "torch"),
        ("adamw", "torch"),
    ],
)
def test_named_implementation_is_taken(operation: str, name: str) -> None:
    assert backend.choose(operation, name, CPU).name == name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_unknown_name_is_refused_with_those_that_work(operation: str) -> None:
    with pytest.raises(KernelError, match=rf"output.{operation} = 'mkl' .*\n.*: auto, "):
        backend.choose(operation, "mkl", CPU)


def test_named_jit_is_refused_and_auto_avoids_it_where_scripting_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "scripting_failure", lambda: "RuntimeError: no TorchScript")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KernelError, match=r"'jit' cannot run on cpu: .*no TorchScript(.|\n)*: auto, torch$"):
        backend.choose("bias_gelu", "jit", CPU)
    gpu_choice = backend.choose("bias_gelu", "auto", torch.device("cuda"))
    assert gpu_choice.name == "torch"
    assert "no TorchScript" in gpu_choice.reason


@pytest.mark.parametrize(
    "operation", ["layer_norm", "bias_gelu", "glu", "head", "dropout_add", "gradient_sum", "adamw"]
)
def test_triton_by_name_is_refused_on_a_cpu_and_where_it_is_not_installed(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KernelError, match=r"'triton' cannot run on cpu: Triton compiles for GPUs"):
        backend.choose(operation, "triton", CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KernelError, match=r"'triton' cannot run on cuda: Triton is not installed"):
        backend.choose(operation, "triton", torch.device("cuda"))
    assert backend.choose(operation, "auto", torch.device("cuda")).name != "triton"


def test_the_erf_gelu_has_one_implementation_whatever_is_asked_for() -> None:
    with pytest.raises(KernelError, match=r"output.bias_gelu = 'jit' is not .* gelu_erf\n.*: auto, torch$"):
        backend.choose("gelu_erf", "jit", CPU)


@pytest.mark.skipif(not INSTALLED, reason=ABSENT)
@pytest.mark.parametrize("operation", ["layer_norm", "bias_gelu", "glu", "head", "gradient_sum"])
def test_auto_takes_triton_on_a_gpu(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "failure", lambda *_, **__: None)  # it needs the GPU
    assert backend.choose(operation, "auto", torch.device("cuda")).name == "triton"


@pytest.mark.skipif(not INSTALLED, reason=ABSENT)
def test_auto_fuses_dropout_only_where_something_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "failure", lambda *_, **__: None)  # it needs the GPU
    picks = {drops: backend.choose("dropout_add", "auto", torch.device("cuda"), drops=drops).name for drops in (0, 1)}
    assert picks == {0: "torch", 1: "triton"}
    assert backend.choose("dropout_add", "auto", CPU, drops=True).name == "torch"


def test_the_reason_on_a_cpu_is_about_what_the_model_drops() -> None:
    reasons = {drops: backend.choose("dropout_add", "auto", CPU, drops=drops).reason for drops in (False, True)}
    assert reasons[False].startswith("without dropout")
    assert reasons[True] == "separate operations; Triton compiles for GPUs"


def test_auto_leaves_the_update_to_torch_everywhere() -> None:
    picks = {device: backend.choose("adamw", "auto", torch.device(device)).name for device in ("cpu", "cuda")}
    assert picks == {"cpu": "torch", "cuda": "torch"}


def test_only_tritons_layer_norm_brings_the_addition_along() -> None:
    assert backend.choose_add_layer_norm("torch") is None
    assert INSTALLED is False or backend.choose_add_layer_norm("triton") is not None
    assert backend.choose_layer_norm_and_pass("torch") is None
    assert INSTALLED is False or backend.choose_layer_norm_and_pass("triton") is not None


def test_apex_by_name_is_refused_where_it_is_not() -> None:
    with pytest.raises(KernelError, match="'apex' cannot run on cpu: apex's kernels are for GPUs"):
        backend.choose("layer_norm", "apex", CPU)

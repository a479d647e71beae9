"""The choice of implementations."""

from __future__ import annotations

import pytest
import torch

from megalm.errors import KernelError
from megalm.kernels import backend
from megalm.kernels.bias_gelu import jit

CPU = torch.device("cpu")
OPERATIONS = ["attention", "layer_norm", "bias_gelu"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_auto_names_its_pick_and_the_reason(operation: str) -> None:
    choice = backend.choose(operation, "auto", CPU)
    assert choice.name != "auto"
    assert choice.reason
    assert callable(choice.implementation)


@pytest.mark.parametrize(
    "operation, name",
    [
        ("attention", "baddbmm"),
        ("attention", "sdpa"),
        ("layer_norm", "reference"),
        ("layer_norm", "torch"),
        ("bias_gelu", "torch"),
        ("bias_gelu", "jit"),
    ],
)
def test_named_implementation_is_taken(operation: str, name: str) -> None:
    assert backend.choose(operation, name, CPU).name == name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_unknown_name_is_refused_with_those_that_work(operation: str) -> None:
    with pytest.raises(KernelError, match=rf"output.{operation} = 'apex' .*\n.*: auto, "):
        backend.choose(operation, "apex", CPU)


def test_named_jit_is_refused_and_auto_avoids_it_where_scripting_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "scripting_failure", lambda: "RuntimeError: no TorchScript")
    with pytest.raises(KernelError, match=r"'jit' cannot run on cpu: .*no TorchScript(.|\n)*: auto, torch$"):
        backend.choose("bias_gelu", "jit", CPU)
    gpu_choice = backend.choose("bias_gelu", "auto", torch.device("cuda"))
    assert gpu_choice.name == "torch"
    assert "no TorchScript" in gpu_choice.reason

"""Which attention core a model gets, and FlexAttention as one of them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from megalm.errors import KernelError
from megalm.kernels import backend, self_check
from megalm.kernels.alibi import alibi_slopes
from megalm.kernels.attention import suitability
from megalm.kernels.attention.baddbmm import BaddbmmAttention
from megalm.kernels.attention.flex import FlexAttention
from megalm.kernels.attention.sdpa import SdpaAttention, fastest_first
from megalm.kernels.attention.suitability import AttentionUse, preferred_core, triton_misfit, triton_obstacle

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BLOOM = AttentionUse(alibi=True, head_size=128, dtype=torch.bfloat16)
ROOT = Path(__file__).resolve().parents[3]


def _find(monkeypatch: pytest.MonkeyPatch, find_spec: Callable[[str], str | None]) -> None:
    monkeypatch.setattr(suitability, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=find_spec)))


def _pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], shared_kib: int) -> None:
    properties = SimpleNamespace(shared_memory_per_block_optin=shared_kib << 10)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.fixture
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the machine had an H100 and Triton."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    _pretend(monkeypatch, (9, 0), 227)
    monkeypatch.setattr(suitability, "triton_missing", lambda: None)
    _find(monkeypatch, lambda name: name)
    monkeypatch.setattr(self_check, "failure", lambda *_, **__: None)  # it needs the GPU


@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize(
    "use, name, reason",
    [
        (BLOOM, "triton", "ALiBi in registers"),
        (replace(BLOOM, head_size=80, dropout=True, documents=True), "triton", "ALiBi"),
        (replace(BLOOM, alibi=False), "sdpa", "nothing is faster"),
        (replace(BLOOM, alibi=False, documents=True), "triton", "document masks"),
        (replace(BLOOM, head_size=192), "flex", "head size 192"),
        (replace(BLOOM, head_size=192, dropout=True), "sdpa", "head size 192"),
        (replace(BLOOM, dtype=torch.float32), "sdpa", "float32"),
        (None, "sdpa", "every model"),
    ],
)
def test_auto_takes_the_core_that_suits_the_model(use: AttentionUse | None, name: str, reason: str) -> None:
    chosen, why = preferred_core(GPU, use)
    assert chosen == name
    assert reason in why
    assert backend.choose("attention", "auto", GPU, use=use).name == name


def test_auto_on_a_cpu_is_sdpa_whatever_the_model() -> None:
    assert backend.choose("attention", "auto", CPU, use=BLOOM).name == "sdpa"


@pytest.mark.usefixtures("_hopper")
def test_auto_says_why_it_avoids_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suitability, "triton_missing", lambda: "Triton is not installed")
    name, reason = preferred_core(GPU, BLOOM)
    assert name == "sdpa"
    assert "Triton is not installed" in reason


@pytest.mark.parametrize("name", ["triton", "flex"])
def test_cores_for_gpus_are_refused_on_a_cpu_with_those_that_work(name: str) -> None:
    with pytest.raises(KernelError, match=rf"'{name}' cannot run on cpu: (.|\n)*auto, baddbmm, sdpa$"):
        backend.choose("attention", name, CPU, use=BLOOM)


@pytest.mark.usefixtures("_hopper")
def test_a_named_core_that_cannot_serve_the_model_is_refused() -> None:
    with pytest.raises(
        KernelError, match=r"head size 200 is not a multiple of 8 up to 128\n.*: auto, baddbmm, sdpa, flex"
    ):
        backend.choose("attention", "triton", GPU, use=replace(BLOOM, head_size=200))
    with pytest.raises(KernelError, match=r"no dropout"):
        backend.choose("attention", "flex", GPU, use=replace(BLOOM, dropout=True))


@pytest.mark.usefixtures("_hopper")
def test_older_gpus_and_tritons_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_obstacle(GPU) is None
    assert triton_misfit(BLOOM) is None
    _find(monkeypatch, lambda name: None)
    assert "tensor descriptors" in (triton_obstacle(GPU) or "")
    _pretend(monkeypatch, (7, 5), 64)
    assert "this GPU has less" in (triton_obstacle(GPU) or "")


@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize(
    "capability, shared_kib, obstacle, name",
    [
        ((8, 0), 163, None, "flex"),  # A100: correct there, but registers spill without the copy engine.
        ((10, 0), 227, None, "triton"),
        ((12, 0), 99, "196 KiB of shared memory, this GPU has 99", "flex"),
    ],
)
def test_gpus_other_than_hopper_get_what_runs_well_there(
    capability: tuple[int, int], shared_kib: int, obstacle: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, capability, shared_kib)
    assert (triton_obstacle(GPU) is None) if obstacle is None else (obstacle in (triton_obstacle(GPU) or ""))
    assert preferred_core(GPU, BLOOM)[0] == name


def test_choosing_on_a_cpu_loads_no_triton_and_kernel_files_import_without_it() -> None:
    program = """
import sys
import torch
from megalm.kernels.backend import choose
for name in ("auto", "sdpa", "baddbmm"):
    choose("attention", name, torch.device("cpu"))
assert "triton" not in sys.modules
sys.modules["triton"] = None
import megalm.kernels.attention.triton_flash
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)


def test_torch_tries_cudnn_first_inside_the_block_alone() -> None:
    q = torch.zeros(1)
    assert isinstance(fastest_first(q), contextlib.nullcontext)
    before = torch._C._get_sdp_priority_order()
    with fastest_first(cast(torch.Tensor, SimpleNamespace(device=GPU))):
        assert torch._C._get_sdp_priority_order()[0] == int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)
    assert torch._C._get_sdp_priority_order() == before


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("mask", ["none", "starts", "square"])
def test_flex_matches_the_oracle_forward(mask: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 40, 16, generator=generator) for _ in range(3))
    starts = torch.tensor([[0] * 10 + [10] * 30, [0] * 40])
    masks = {"none": None, "starts": starts, "square": (torch.arange(40) < starts[:, :, None])[:, None]}
    slopes = alibi_slopes(3)
    with torch.no_grad():
        results = [
            core(q, k, v, slopes=slopes, mask=masks[mask], dropout=0.0, training=True)
            for core in (FlexAttention(compiled=False), BaddbmmAttention(), SdpaAttention())
        ]
    # The bound of the oracle's own test in fp32.
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=3e-6)
    torch.testing.assert_close(results[2], results[1], rtol=0, atol=3e-6)


def test_flex_refuses_dropout_in_training() -> None:
    q = torch.zeros(1, 1, 8, 16)
    with pytest.raises(KernelError, match=r"cannot drop weights: attention dropout is 0.1\n.*triton"):
        FlexAttention(compiled=False)(q, q, q, slopes=None, mask=None, dropout=0.1, training=True)
    assert suitability.flex_misfit(replace(BLOOM, dropout=True))

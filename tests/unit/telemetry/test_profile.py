"""A profile counts the steps it was asked for and says what each family of kernels took of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from megalm.telemetry.profile import KernelTime, StepProfiler, family, share_table


@pytest.mark.parametrize(
    "name, expected",
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matrix products"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("triton_poi_fused_add_gelu_0", "GELU and gates"),
        ("attention_key_value_gradient", "attention"),
        ("attention_key_norms", "attention"),
        ("layer_norm_backward", "normalisation"),
        ("activation_forward", "GELU and gates"),
        ("gate_backward", "GELU and gates"),
        ("cross_entropy_gradient", "head and cross-entropy"),
        ("gradient_sum_add_rows", "gradient sums"),
        ("adamw_update", "optimizer"),
        ("triton_red_fused_sum_3", "compiled regions"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise and reductions"),
        ("aten::mm", "matrix products"),
        ("aten::native_layer_norm", "normalisation"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("something new", "other"),
    ],
)
def test_a_kernel_is_counted_in_its_family(name: str, expected: str) -> None:
    assert family(name) == expected


def test_shares_are_of_the_step_and_leave_the_idle_time() -> None:
    kernels = [KernelTime("aten::mm", 6_000.0, 12), KernelTime("aten::bmm", 2_000.0, 4), KernelTime("odd", 1_000.0, 2)]
    lines = share_table(kernels, wall_seconds=0.020, num_steps=2, on="the CPU").splitlines()
    assert lines[0] == "2 step(s) of 10.00 ms, kernels on the CPU"
    rows = {line[:28].strip(): line[28:].split() for line in lines[3:6]}
    assert rows == {
        "idle": ["5.500", "55.0%", "0.0"],
        "matrix products": ["4.000", "40.0%", "8.0"],
        "other": ["0.500", "5.0%", "1.0"],
    }


def test_the_steps_asked_for_are_written_and_no_others(tmp_path: Path) -> None:
    said: list[str] = []
    profiler = StepProfiler(tmp_path / "profile", first=2, last=3, rank=7, report=said.append)
    for number in range(1, 6):
        with profiler.step(number):
            torch.ones(64, 64) @ torch.ones(64, 64)
    stem = tmp_path / "profile" / "steps_2_to_3_rank_7"
    assert sorted(path.name for path in stem.parent.iterdir()) == [f"{stem.name}.trace.json.gz", f"{stem.name}.txt"]
    assert Path(f"{stem}.txt").read_text().startswith("2 step(s) of ")
    with gzip.open(f"{stem}.trace.json.gz", "rt") as file:
        products = [event for event in json.load(file)["traceEvents"] if event.get("name") == "aten::mm"]
    assert len(products) == 2
    assert len(said) == 1
    assert str(stem) in said[0]


def test_a_run_that_ends_early_keeps_what_was_recorded(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, first=5, last=9, rank=0, report=str)
    for number in (5, 6):
        with profiler.step(number):
            torch.ones(4).sum()
    profiler.close()
    assert (tmp_path / "steps_5_to_6_rank_0.txt").exists()


def test_nothing_is_written_unless_asked_for(tmp_path: Path) -> None:
    profiler = StepProfiler(None, first=1, last=2, rank=0)
    with profiler.step(1):
        pass
    profiler.close()
    assert not list(tmp_path.iterdir())

"""Predicted steps against those that were published, and those that were measured here."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megalm.config.model import ModelConfig
from megalm.planning.gpus import GPUS
from megalm.planning.job import Job, Spreading
from megalm.planning.memory import most_bytes
from megalm.planning.search import MICRO_BATCHES, USABLE
from megalm.planning.step_time import OF_2021, step_parts
from megalm.topology.layout import Layout

A100 = GPUS["a100-80gb"]
PUBLISHED = [
    # heads, hidden size, layers, tp, pp, GPUs, global batch, TFLOP/s of a GPU: Narayanan et al. 2021, table 1.
    (24, 2304, 24, 1, 1, 32, 512, 137),
    (32, 3072, 30, 2, 1, 64, 512, 138),
    (32, 4096, 36, 4, 1, 128, 512, 142),
    (48, 6144, 40, 8, 1, 256, 1024, 135),
    (64, 8192, 48, 8, 2, 512, 1536, 138),
    (80, 10240, 60, 8, 4, 1024, 1792, 140),
    (96, 12288, 80, 8, 8, 1536, 2304, 148),
    (128, 16384, 96, 8, 16, 1920, 2160, 155),
    (128, 20480, 105, 8, 35, 2520, 2520, 163),
    (128, 25600, 128, 8, 64, 3072, 3072, 163),
]
SHARE = 0.09
"""Two numbers were fitted to eleven published figures; 8.2 % is what the worst of them is off by."""


def job(layers: int, hidden: int, heads: int, vocabulary: int, batch: int) -> Job:
    model = ModelConfig(num_layers=layers, hidden_size=hidden, num_heads=heads, pad_vocab_size_to=vocabulary)
    return Job(model, 2048, batch)


@pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: f"h={run[1]}")
def test_megatrons_published_runs_are_predicted(run: tuple[int, ...]) -> None:
    """The best micro-batch and interleaving that fit, as neither is published."""
    heads, hidden, layers, tp, pp, gpus, batch, published = run
    shape = job(layers, hidden, heads, 51_200, batch)
    layout = Layout(tp=tp, pp=pp, dp=gpus // (tp * pp))
    seconds = math.inf
    for size in MICRO_BATCHES:
        spreading = Spreading(layout, size, "full")
        if batch % (layout.dp * size) or most_bytes(shape, spreading) > USABLE * A100.memory_bytes:
            continue
        for chunks in (chunks for chunks in range(1, layers // pp + 1) if pp > 1 or chunks == 1):
            if layers // pp % chunks == 0:
                parts = step_parts(shape, spreading, A100, gpus_per_host=8, kernels=OF_2021, num_chunks=chunks)
                seconds = min(seconds, parts.total)
    # What the table counts, recomputation included.
    flops = 96 * batch * 2048 * layers * hidden**2 * (1 + 2048 / (6 * hidden) + 51_200 / (16 * layers * hidden))
    assert flops / gpus / seconds / 1e12 == pytest.approx(published, rel=SHARE)


def test_bloom_176b_is_predicted() -> None:
    """105.2 s a step on 48 hosts of 8 A100, four Omni-Path adapters of 100 Gb/s each."""
    fabric = replace(A100, network_rate=0.8 * 4 * 100e9 / 8 / 8)
    spreading = Spreading(Layout(tp=4, pp=12, dp=8), 2, "full", counts_ends=True)
    parts = step_parts(job(70, 14_336, 112, 250_880, 2048), spreading, fabric, gpus_per_host=8, kernels=OF_2021)
    assert parts.total == pytest.approx(105.2, rel=SHARE)


@pytest.mark.parametrize("hidden, milliseconds", [(2048, 2385.8), (1024, 905.4)], ids=["1b7", "560m"])
def test_the_trainers_own_steps_are_predicted(hidden: int, milliseconds: float) -> None:
    """docs/performance.md, one H100, micro-batch 8."""
    spreading = Spreading(Layout(tp=1, pp=1, dp=1), 8)
    parts = step_parts(job(24, hidden, 16, 250_880, 64), spreading, GPUS["h100"], gpus_per_host=1)
    assert 1e3 * parts.total == pytest.approx(milliseconds, rel=0.03)


def test_what_parallelism_costs_appears_where_it_is() -> None:
    shape = job(24, 2048, 16, 51_200, 64)

    def parts(tp: int, pp: int, dp: int, **more: object) -> dict[str, float]:
        spreading = Spreading(Layout(tp=tp, pp=pp, dp=dp), 2, **more)  # type: ignore[arg-type]
        return vars(step_parts(shape, spreading, GPUS["h100"], gpus_per_host=8))

    alone = parts(1, 1, 1)
    assert alone["tensor_parallel"] == alone["sends"] == alone["bubble"] == alone["replicas"] == 0.0
    assert parts(2, 1, 1)["tensor_parallel"] > 0.0
    assert parts(1, 2, 1)["bubble"] > parts(1, 2, 1)["sends"] > 0.0
    assert parts(1, 1, 2)["replicas"] > 0.0
    assert parts(1, 1, 1, recompute="full")["products"] == pytest.approx(4 / 3 * alone["products"])
    assert alone["between"] < parts(1, 1, 1, recompute="activation")["between"] < 4 / 3 * alone["between"]

"""The program on one GPU, in each arithmetic: it learns, scales its loss where it must, and resumes bit for bit."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.launching import ROOT, Ended, finish, program
from tests.support.tiny_run import write_corpus

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _run(folder: Path, *flags: str) -> Ended:
    import subprocess

    corpus = folder / "corpus_text_document"
    if not corpus.with_name(f"{corpus.name}.idx").exists():
        write_corpus(folder)
    environment = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "RANK")}
    command = [sys.executable, *program("--data-path", str(corpus), "--save", str(folder / "run"), *flags)]
    if "--train-samples" in flags:  # in place of the tiny run's steps
        for name in ("--train-iters", "--lr-warmup-iters"):
            place = command.index(name)
            del command[place : place + 2]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return finish(process)


def _records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_loss_falls(dtype: str, tmp_path: Path) -> None:
    ended = _run(tmp_path, f"training.dtype={dtype}", "training.initial_loss_scale=65536")
    assert ended.code == 0, ended.output
    records = _records(tmp_path)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert (records[-1]["loss_scale"] is not None) == (dtype == "fp16")


def test_the_loss_falls_with_the_update_in_one_pass_as_with_torchs(tmp_path: Path) -> None:
    losses = []
    for name in ("torch", "triton"):
        folder = tmp_path / name
        folder.mkdir()
        ended = _run(folder, "--bf16", "--adamw-kernel", name)
        assert ended.code == 0, ended.output
        losses.append([record["loss"] for record in _records(folder)])
    assert losses[0][0] == losses[1][0]  # before the first update
    assert losses[1][-1] < losses[1][0] - 0.5


def test_an_overflow_of_fp16_skips_the_update_and_halves_the_scale(tmp_path: Path) -> None:
    ended = _run(tmp_path, "--fp16", "--hysteresis", "1", "training.initial_loss_scale=4294967296")
    assert ended.code == 0, ended.output
    records = _records(tmp_path)
    assert records[0]["skipped"]
    assert records[-1]["loss_scale"] < records[0]["loss_scale"]
    assert not records[-1]["skipped"]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    flags = ["--bf16", "--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
    assert _run(whole, *flags).code == 0
    assert _run(parts, *flags, "--exit-interval", "7").code == 75
    resumed = _run(parts, *flags, "--load", str(parts / "run"))
    assert resumed.code == 0, resumed.output
    assert [r["loss_hex"] for r in _records(parts)] == [r["loss_hex"] for r in _records(whole)]


needs_hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="on older GPUs ALiBi takes FlexAttention, which no graph holds",
)


def _with_graph(folder: Path, *flags: str) -> Ended:
    ended = _run(folder, "--bf16", "--cuda-graph", *flags)
    assert "CUDA graph: off" not in ended.output, ended.output  # the warning of a micro-batch that was not recorded
    return ended


@needs_hopper
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--no-compile"],
        ["--rampup-batch-size", "4", "4", "24", "--train-samples", "136"],
        ["--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss"],
        ["--recompute-granularity", "full"],
        ["--recompute-granularity", "activation"],
        ["--z-loss-coeff", "1e-3"],
        ["--gelu-linear-kernel", "cublaslt"],
    ],
    ids=["compiled", "uncompiled", "growing-batch", "documents", "recomputed", "activation", "z-loss", "gelu-inside"],
)
def test_micro_batches_as_a_graph_train_as_those_one_by_one(flags: list[str], tmp_path: Path) -> None:
    losses = []
    for name, runs, graph in (("graph", _with_graph, []), ("plain", _run, ["--bf16", "--no-cuda-graph"])):
        folder = tmp_path / name
        folder.mkdir()
        ended = runs(folder, *graph, *flags)
        assert ended.code == 0, ended.output
        losses.append([(record["loss_hex"], record["grad_norm"]) for record in _records(folder)])
    assert len(losses[0]) == len(losses[1]) > 10
    assert losses[0] == losses[1]


@needs_hopper
def test_a_resumed_run_with_a_graph_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    assert _with_graph(whole).code == 0
    assert _with_graph(parts, "--exit-interval", "7").code == 75
    resumed = _with_graph(parts, "--load", str(parts / "run"))
    assert resumed.code == 0, resumed.output
    assert [r["loss_hex"] for r in _records(parts)] == [r["loss_hex"] for r in _records(whole)]

"""tools/plan.py: the layout that was asked for, better ones, and their flags."""

from __future__ import annotations

import pytest

from megalm.config.parse import parse_command_line
from tools.plan import main

BLOOM = ["--num-gpus", "384", "--gpu", "a100-80gb", "--config", "configs/cluster/bloom-176b-384xa100.yaml"]


def test_the_layout_that_was_asked_for_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BLOOM, "--tokens", "366e9"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("176,247,271,424 parameters, 2,048 samples of 2,048 tokens a step, 384 a100-80gb")
    assert said[3].split()[:5] == ["4", "12", "8", "2", "full"]
    assert said[3].endswith("as asked")
    assert any(line.startswith("366,000,000,000 tokens: 87,261 steps") for line in said)


def test_its_flags_are_those_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BLOOM, "--top", "1"]) == 0
    out = capsys.readouterr().out
    flags = next(line for line in out.splitlines() if line.startswith("--tensor")).replace("'", "").split()
    run = ["--data-path", "corpus", "--tokenizer-name-or-path", "tokenizer"]
    parallel = parse_command_line([*BLOOM[4:], *flags, *run]).parallel
    assert out.splitlines()[4].split()[:2] == [str(parallel.tp), str(parallel.pp)]


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--num-gpus", "1", "--config", "configs/bloom/7b1.yaml", "--micro-batch-size", "1"]) == 1
    said = capsys.readouterr()
    assert "as asked: DOES NOT FIT" in said.out
    assert "no layout of 1 x h100 holds this model" in said.err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config", "configs/gptmeg/2b7.yaml"], "pass --vocab-size"),
        (["--config", "configs/bloom/7b1.yaml", "--tensor-model-parallel-size", "3"], "must divide"),
        (["--config", "configs/bloom/7b1.yaml", "--zero-stage", "3"], "bf16 with ZeRO-0 or 1"),
        (["--config", "configs/bloom/7b1.yaml", "--num-gpu", "4"], "--num-gpu is not a flag"),
        (["--config", "configs/bloom/7b1.yaml", "--top", "0"], "--top 0 must be at least 1"),
        (["--config", "configs/bloom/7b1.yaml", "--tokens", "-5"], "--tokens -5 must be a number above 0"),
        (["--config", "configs/bloom/7b1.yaml", "--tokens", "nan"], "--tokens nan must be a number above 0"),
        (["--config", "configs/bloom/7b1.yaml", "--network-gbits", "0"], "--network-gbits 0 must be a number above 0"),
    ],
)
def test_what_cannot_be_planned_is_an_answer(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--num-gpus", "8", *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("size, fitting", [(3, "504 or 528"), (100, "800")])
def test_a_batch_that_the_layout_asked_for_cannot_share_out_is_planned_for_others(
    size: int, fitting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", "configs/bloom/7b1.yaml", "--micro-batch-size", str(size)]
    assert main(["--num-gpus", "8", *flags]) == 0
    said = capsys.readouterr().out.splitlines()
    wanted = f"512 samples are no multiple of micro-batch {size} * 8 replicas, {fitting} would be"
    assert said[3] == f"  as asked, tp 1 x pp 1: {wanted}"
    assert said[4].split()[0].isdigit()

"""When a run tries kernels, and that it computes after a restart as it did before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megalm.config.parse import parse_command_line
from megalm.config.root import Config
from megalm.errors import CheckpointError
from megalm.kernels import trial
from megalm.kernels.backend import Verdict
from megalm.kernels.bias_gelu.eager import bias_gelu
from megalm.train import contests
from megalm.train.contests import Contests

CUDA = torch.device("cuda", 0)
RUN = ["--config", "configs/debug/tiny.yaml", "--data-path", "corpus", "--bf16", "--train-iters", "1"]
RUN += ["--tokenizer-name-or-path", "tokenizer"]


def config_of(*flags: str) -> Config:
    return parse_command_line([*RUN, *flags])


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[Verdict]:
    """A GPU as far as contests ask, and the verdicts that they will come to."""
    verdicts: list[Verdict] = []

    def tried(contest: Callable[[], Verdict], *, device: torch.device) -> Verdict:
        assert device == CUDA
        return verdicts.pop(0)

    monkeypatch.setattr(contests, "obstacle_of", lambda operation, name, device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a Hopper GPU")
    monkeypatch.setattr(trial, "in_a_process", tried)
    return verdicts


def verdict_of(config: Config) -> tuple[Contests, Verdict]:
    found = Contests(config, CUDA, dtype=torch.bfloat16)
    contest = found.gelu_linear()
    assert contest is not None
    return found, contest(bias_gelu)


@pytest.mark.parametrize(
    "flags",
    [
        ["--gelu-linear-kernel", "separate"],
        ["--glu-activation", "swiglu"],
        ["--no-bias-gelu-fusion"],
        ["--recompute-granularity", "activation"],
        ["output.linear=fp8"],
        ["--tensor-model-parallel-size", "2"],
        ["--zero-stage", "3"],
        ["training.dtype=fp32"],
    ],
    ids=" ".join,
)
def test_the_gelu_is_tried_only_where_it_could_go_inside(hopper: list[Verdict], flags: list[str]) -> None:
    assert Contests(config_of(), CUDA, dtype=torch.bfloat16).gelu_linear() is not None
    assert Contests(config_of(*flags), CUDA, dtype=torch.bfloat16).gelu_linear() is None


def test_nothing_is_tried_before_hopper_or_where_it_cannot_run(
    hopper: list[Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert Contests(config_of(), CUDA, dtype=torch.bfloat16).gelu_linear() is None
    monkeypatch.undo()
    assert Contests(config_of(), torch.device("cpu"), dtype=torch.bfloat16).gelu_linear() is None
    assert Contests(config_of(), torch.device("cpu"), dtype=torch.bfloat16).adamw() is None


@pytest.mark.parametrize("is_better", [True, False])
@pytest.mark.parametrize("named", ["", "global_step5"])
def test_a_resumed_run_computes_as_it_did(hopper: list[Verdict], tmp_path: Path, named: str, is_better: bool) -> None:
    hopper.append(Verdict(is_better, "as measured at the start"))
    found, verdict = verdict_of(config_of("--save", str(tmp_path)))
    assert verdict.is_better is is_better
    found.record({"gelu_linear": "cublaslt" if is_better else "separate"})

    again, verdict = verdict_of(config_of("--save", str(tmp_path), "--load", str(tmp_path / named)))
    assert verdict == (is_better, "as measured at the start")
    before = (tmp_path / "kernels.json").read_bytes()
    again.record({"gelu_linear": "cublaslt" if is_better else "separate"})
    assert (tmp_path / "kernels.json").read_bytes() == before


def test_ranks_that_did_not_agree_are_remembered_as_they_went_on(hopper: list[Verdict], tmp_path: Path) -> None:
    hopper.append(Verdict(True, "on this rank"))
    found, _ = verdict_of(config_of("--save", str(tmp_path)))
    found.record({"gelu_linear": "separate"})
    _, verdict = verdict_of(config_of("--load", str(tmp_path)))
    assert not verdict.is_better


@pytest.mark.parametrize("change", ["gpu", "batch", "damage", "other content"])
def test_what_was_found_elsewhere_is_tried_again(
    hopper: list[Verdict], tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper += [Verdict(True, "first"), Verdict(False, "second")]
    found, _ = verdict_of(config_of("--save", str(tmp_path)))
    found.record({"gelu_linear": "cublaslt"})
    flags = ["--load", str(tmp_path)]
    if change == "gpu":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    elif change == "batch":
        flags += ["--micro-batch-size", "3"]
    elif change == "damage":
        (tmp_path / "kernels.json").write_text("{", encoding="utf-8")
    else:
        (tmp_path / "kernels.json").write_text(json.dumps({"gelu_linear": [1]}), encoding="utf-8")
    _, verdict = verdict_of(config_of(*flags))
    assert verdict.reason == "second"


def test_what_cannot_be_kept_is_said_and_an_evaluation_keeps_nothing(hopper: list[Verdict], tmp_path: Path) -> None:
    hopper += [Verdict(True, "first"), Verdict(True, "second")]
    (tmp_path / "file").touch()
    found, _ = verdict_of(config_of("--save", str(tmp_path / "file")))
    with pytest.raises(CheckpointError, match="cannot write .*kernels.json"):
        found.record({"gelu_linear": "cublaslt"})
    found, _ = verdict_of(config_of("--save", str(tmp_path), "--load", str(tmp_path), "--eval-only"))
    found.record({"gelu_linear": "cublaslt"})
    assert not (tmp_path / "kernels.json").exists()

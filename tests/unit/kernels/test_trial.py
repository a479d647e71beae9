"""Kernels that are tried before a run takes them: right, repeatable, faster; in a process that may end in any way."""

from __future__ import annotations

import os
import time
from functools import partial
from multiprocessing import Pipe
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.kernels import backend, trial
from megalm.kernels.adamw.oracle import TorchAdamW
from megalm.kernels.backend import Verdict
from megalm.kernels.bias_gelu.eager import bias_gelu
from megalm.kernels.gelu_linear import operations
from megalm.kernels.gelu_linear.oracle import TorchGeluLinear

CPU = torch.device("cpu")
ON_GPU = torch.cuda.is_available()
PAUSE_SECONDS = 0.02
"""Some ten times what either side computes for."""


def found(reason: str) -> Verdict:
    return Verdict(True, reason)


def raises() -> Verdict:
    raise RuntimeError("an illegal address\nand its backtrace")


def ends(code: int) -> Verdict:
    os._exit(code)


def never_ends() -> Verdict:
    time.sleep(600.0)
    return Verdict(True, "late")


@pytest.mark.parametrize(
    "contest, wanted",
    [
        (partial(found, "1 ms"), Verdict(True, "1 ms; tried in ")),
        (partial(ends, 139), Verdict(False, "its process ended with code 139; tried in ")),
        (raises, Verdict(False, "RuntimeError: an illegal address; tried in ")),
        (lambda: Verdict(True, "cannot be pickled"), Verdict(False, "")),
    ],
    ids=["verdict", "crash", "exception", "not to be sent"],
)
def test_a_process_gives_its_verdict_or_how_it_ended(contest: Any, wanted: Verdict) -> None:
    is_better, reason = trial.in_a_process(contest)
    assert is_better == wanted.is_better
    assert reason.startswith(wanted.reason)


def test_a_contest_is_held_on_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    current, third = [torch.device("cuda", 0)], torch.device("cuda", 3)  # as in every new process
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device))
    ours, theirs = Pipe(duplex=False)
    trial._answer(lambda: Verdict(current[-1] == third, ""), third, theirs)
    assert ours.recv().is_better


def test_a_process_without_an_answer_is_ended() -> None:
    started = time.perf_counter()
    is_better, reason = trial.in_a_process(never_ends, seconds=0.3)
    assert not is_better
    assert reason.startswith("no answer in 0.3 s")
    assert time.perf_counter() - started < 30.0, "it did not wait for what never ends"


class Slow(TorchGeluLinear):
    name = "slow"

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(PAUSE_SECONDS)
        return super().forward(x, weight, bias)


class RoundsTheGradient(TorchGeluLinear):
    def backward(self, grad: Tensor, weight: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        gradient, bias = super().backward(grad, weight, inner)
        return gradient.to(torch.float8_e5m2).to(gradient.dtype), bias


class Differs(TorchGeluLinear):
    calls = 0

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        y, inner = super().forward(x, weight, bias)
        y[0, 0] += 2.0 ** -(4 + self.calls % 3)
        return y, inner


def slow_bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    time.sleep(PAUSE_SECONDS)
    return bias_gelu(x, bias)


@pytest.mark.parametrize(
    "kernel, between, is_better, words",
    [
        (TorchGeluLinear(), slow_bias_gelu, True, "ms where the other takes"),
        (Slow(), bias_gelu, False, "ms where the other takes"),
        (RoundsTheGradient(), slow_bias_gelu, False, "its gradient errs by"),
        (Differs(), slow_bias_gelu, False, "differ from one call to the next"),
    ],
    ids=["faster", "slower", "less exact", "not the same"],
)
def test_the_gelu_goes_inside_where_that_is_right_and_faster(
    kernel: Any, between: Any, is_better: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(operations.BY_NAME, "tried", kernel)
    verdict = trial.gelu_inside(
        "tried", between, device=CPU, dtype=torch.bfloat16, num_tokens=40, hidden_size=16, ffn_size=64
    )
    assert verdict.is_better is is_better
    assert words in verdict.reason


class SlowUpdate(TorchAdamW):
    def update_(self, *tensors: Any, **options: Any) -> None:
        time.sleep(PAUSE_SECONDS)
        super().update_(*tensors, **options)


class LeavesTheSum(TorchAdamW):
    def update_(self, master: Tensor, gradient: Tensor, weight: Tensor, **options: Any) -> None:
        super().update_(master, gradient.clone(), weight, **options)


def test_an_update_is_taken_where_it_is_right_and_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not trial.update(SlowUpdate(), device=CPU, num_elements=1000).is_better
    assert "differs from the reference" in trial.update(LeavesTheSum(), device=CPU, num_elements=1000).reason
    monkeypatch.setattr(trial, "TorchAdamW", SlowUpdate)
    assert trial.update(TorchAdamW(), device=CPU, num_elements=1000).is_better


@pytest.mark.parametrize("is_better, name", [(True, "torch"), (False, "separate")])
def test_auto_follows_the_verdict_and_says_why(is_better: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.CHALLENGERS, "gelu_linear", "torch")
    choice = backend.choose("gelu_linear", "auto", CPU, contest=lambda: Verdict(is_better, "as measured"))
    assert (choice.name, choice.reason) == (name, "torch: as measured")


def test_a_name_is_taken_without_a_contest() -> None:
    assert backend.choose("gelu_linear", "separate", CPU, contest=raises).reason == "asked for by name"


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device: cuBLASLt itself, and graphs")
def test_both_contests_come_to_a_verdict_on_a_gpu() -> None:
    from megalm.kernels.adamw.triton_adamw import TritonAdamW
    from megalm.kernels.bias_gelu.triton_activation import bias_gelu as in_one_pass

    device = torch.device("cuda", 0)
    sizes = {"num_tokens": 4096, "hidden_size": 1024, "ffn_size": 4096}
    contests: list[partial[Verdict]] = [
        partial(trial.gelu_inside, "cublaslt", in_one_pass, device=device, dtype=torch.bfloat16, **sizes),
        partial(trial.update, TritonAdamW(), device=device),
    ]
    for contest in contests:
        verdict = trial.in_a_process(contest)
        print(verdict)
        assert "ms where the other takes" in verdict.reason

"""A micro-batch that is recorded once and replayed: the same training, whatever comes between two replays.

What CUDA records is played by a stand-in that runs Python again, on what then stands in the recorded inputs, and leaves
none of the marks in Python that a replay on a GPU would not leave. tests/gpu holds real graphs against the same runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from megalm.errors import KernelError
from megalm.telemetry.console import Console
from megalm.train.cuda_graph import MicroBatchGraph, choose_cuda_graph, obstacle
from tests.support.ranks import run_ranks
from tests.support.training import TinyRun, tiny_config

pytestmark = pytest.mark.dist

NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
QUIET = Console(False, "error")
MEASURING: list[dict[str, Any]] = [
    {"wall_clock_breakdown": True},
    {"memory_breakdown": True},
    {"timers": {"throughput": {"enabled": True}}},
    {"flops_profiler": {"enabled": True}},
    {"flops_profiler": {"enabled": False}, "timers": {"throughput": {"synchronized": True}}},
]
"""Of the DeepSpeed configuration; the last one measures nothing."""


class Recorder:
    """Stands for CUDA: recording does nothing to sums and losses, and a replay leaves Python's state as it was."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.num_recorded = self.num_replayed = 0

    def __call__(self, work: Callable[[], None]) -> Recorder:
        self.num_recorded += 1
        self._work = work
        sums = [flat.clone() for flat in self._owner.fp32_groups_gradients_flat]
        work()
        self._loss = self.engine.loss.detach()
        for flat, before in zip(self._owner.fp32_groups_gradients_flat, sums, strict=True):
            flat.copy_(before)
        return self

    def replay(self) -> None:
        self.num_replayed += 1
        kept = {name: getattr(self.engine, name) for name in ("total_loss", "loss", "fwd_outputs", "pipe_buffers")}
        self.engine.pipe_buffers = {name: list(buffers) for name, buffers in self.engine.pipe_buffers.items()}
        self._work()
        self._loss.copy_(self.engine.loss.detach())
        vars(self.engine).update(kept)

    @property
    def _owner(self) -> Any:
        return self.engine.optimizer


def _recorded_run(config: Any, recorder: Any) -> TinyRun:
    def graph(raw: Any, sums: Any) -> MicroBatchGraph:
        recorder.engine = raw
        return MicroBatchGraph(raw, sums, QUIET, record=recorder)

    return TinyRun(config, graph=graph)


def _train_both() -> dict[str, Any]:
    config = tiny_config(dtype="bf16", **NO_DROPOUT)
    plain = TinyRun(config)
    losses, recorder = plain.train(0, 3), Recorder()
    evaluated = plain.engine.evaluate(plain._batches(50), num_micro_batches=2)
    losses += plain.train(3, 5)
    recorded = _recorded_run(config, recorder)
    again = recorded.train(0, 3)
    same_evaluation = recorded.engine.evaluate(recorded._batches(50), num_micro_batches=2) == evaluated
    again += recorded.train(3, 5)
    return {
        "same_losses": losses == again,
        "same_state": plain.digest() == recorded.digest(),
        "same_evaluation": same_evaluation,
        "num_recorded": recorder.num_recorded,
        "num_replayed": recorder.num_replayed,
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_replayed_micro_batches_train_as_those_one_by_one(world_size: int) -> None:
    for outcome in run_ranks(_train_both, world_size):
        assert outcome == {
            "same_losses": True,
            "same_state": True,
            "same_evaluation": True,
            "num_recorded": 1,
            "num_replayed": 4 * 4 // world_size,  # all micro-batches of all steps but the first
        }


def _train_with_growing_batch() -> tuple[bool, int]:
    config = tiny_config(dtype="bf16", **NO_DROPOUT)
    recorder = Recorder()
    digests = []
    for run in (TinyRun(config), _recorded_run(config, recorder)):
        for step, batch_size in enumerate((2, 2, 4, 4)):
            run.engine.train_step(run._batches(step), global_batch_size=batch_size, learning_rate=1e-2)
        digests.append(run.digest())
    return digests[0] == digests[1], recorder.num_recorded


class Refusal(Recorder):
    """What CUDA does where work cannot be recorded: half of it has gone through Python by then."""

    def __call__(self, work: Callable[[], None]) -> Recorder:
        sums = [flat.clone() for flat in self._owner.fp32_groups_gradients_flat]
        work()
        for flat, before in zip(self._owner.fp32_groups_gradients_flat, sums, strict=True):
            flat.copy_(before)
        self.num_recorded += 1
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def _train_refused() -> tuple[bool, int]:
    config = tiny_config(dtype="bf16", **NO_DROPOUT)
    recorder = Refusal()
    plain, refused = TinyRun(config), _recorded_run(config, recorder)
    same = plain.train(0, 3) == refused.train(0, 3) and plain.digest() == refused.digest()
    return same, recorder.num_recorded


def _both() -> dict[str, tuple[bool, int]]:
    return {"growing": _train_with_growing_batch(), "refused": _train_refused()}


def test_another_number_of_micro_batches_is_recorded_again_and_what_cannot_be_trains_one_by_one() -> None:
    # In one process, as starting it takes longer than both.
    assert run_ranks(_both, 1) == [{"growing": (True, 2), "refused": (True, 1)}]


def _obstacles() -> list[str | None]:
    config = tiny_config(dtype="bf16", **NO_DROPOUT)
    topology = TinyRun(config).topology
    on_gpu = replace(topology, device=torch.device("cuda", 0))
    found = [
        obstacle(config, topology, attention="triton"),
        obstacle(config, on_gpu, attention="triton"),
        obstacle(config, on_gpu, attention="baddbmm"),
        obstacle(tiny_config(dtype="bf16"), on_gpu, attention="triton"),
        obstacle(tiny_config(dtype="fp16", **NO_DROPOUT), on_gpu, attention="triton"),
        obstacle(tiny_config(dtype="bf16", zero_stage=2, **NO_DROPOUT), on_gpu, attention="triton"),
        *(obstacle(replace(config, deepspeed=keys), on_gpu, attention="triton") for keys in MEASURING),
    ]
    asked = replace(config, output=replace(config.output, cuda_graph="on"))
    try:
        choose_cuda_graph(asked, topology, attention="triton", console=QUIET)
    except KernelError as refused:
        found.append(str(refused))
    return found


def test_a_graph_is_refused_with_the_reason() -> None:
    ((cpu, none, attention, dropout, scaled, sharded, *measuring, unmeasured, refused),) = run_ranks(_obstacles, 1)
    assert none is None and unmeasured is None
    assert [found.split()[0] for found in measuring] == [key for keys in MEASURING[:-1] for key in keys]
    assert "GPUs" in cpu
    assert "baddbmm" in attention
    assert "dropout" in dropout
    assert "bf16" in scaled and "ZeRO" in sharded
    assert "--no-cuda-graph" in refused

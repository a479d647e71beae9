"""What is compared of a rank's parameters, and which way back a run is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megalm.checkpoint.save import SaveReport
from megalm.errors import CheckpointError, ReplicaError
from megalm.models.gpt.build import build_model, plan_gpt
from megalm.parallel.replicas import Drift
from megalm.telemetry.console import Console
from megalm.topology.group import Group
from megalm.topology.topology import Topology
from megalm.train.loop import go_back_if_loss_rose, stop_if_drifted
from megalm.train.replica_check import ReplicaCheck, _held
from megalm.train.saver import Saver
from megalm.train.spikes import Spike
from megalm.train.state import TrainState
from tests.support.training import tiny_config


def test_zero3_compares_a_part_without_the_padding_behind_it() -> None:
    parameter = nn.Parameter(torch.zeros(()))
    parameter.ds_numel, parameter.ds_tensor = 10, torch.arange(4.0)  # type: ignore[attr-defined]
    parts = [_held(parameter, Group(rank, 4, None, (0, 1, 2, 3))).tolist() for rank in range(4)]
    assert parts == [[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0], [0.0, 1.0], []]


@pytest.mark.parametrize(
    "passed, saved_step, load, said",
    [
        ([10, 30], 20, "old", "go on with --load new/global_step20, saved when all were equal"),
        ([30], 20, "new", "go on from what the run began with, --load new"),  # step 20 was loaded
        ([10], -1, "old", "go on from what the run began with, --load old"),
        ([10], -1, None, "there is no checkpoint to go back to"),
    ],
)
def test_the_way_back_is_a_checkpoint_from_before(
    passed: list[int], saved_step: int, load: str | None, said: str
) -> None:
    config = tiny_config()
    config = replace(config, output=replace(config.output, save="new", load=load))
    module = build_model(plan_gpt(config.model), seed=1)
    check = ReplicaCheck(module, config, Topology.solo())
    check.passed = passed
    drift = Drift("dp", (0,), (), ("ln_f.bias",))
    error = check.error([drift], step=40, saved_step=saved_step, config=config)
    assert said in str(error)
    assert "differ in 1 parameter after step 40" in str(error)


def test_a_save_that_fails_as_the_run_ends_is_no_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    config = replace(config, output=replace(config.output, save="new", async_save=True))
    console = Console(True, "warning")
    saver: Any = Saver(config, Topology.solo(), engine=None, streams=None, console=console)  # type: ignore[arg-type]
    saver._report(SaveReport(Path("new/global_step10"), num_bytes=0, elapsed_seconds=0.0, stall_seconds=0.0))
    saver.saved_step = 20  # is being written

    def fails() -> None:
        raise CheckpointError("the disk is full")

    check = ReplicaCheck(build_model(plan_gpt(config.model), seed=1), config, Topology.solo())
    check.passed = [10, 20]
    monkeypatch.setattr(saver.background, "finish", fails)
    monkeypatch.setattr(check, "find", lambda step: [Drift("dp", (0,), (), ("ln_f.bias",))])
    watchdog = SimpleNamespace(at=lambda operation, step: None)
    run: Any = SimpleNamespace(
        config=config, saver=saver, replicas=check, console=console, watchdog=watchdog, state=TrainState(step=30)
    )
    with pytest.raises(ReplicaError, match="go on with --load new/global_step10, saved when all were equal"):
        stop_if_drifted(run)


def test_a_spike_of_replicas_that_drifted_is_not_blamed_on_the_data() -> None:
    compared = []

    def find(step: int) -> list[Drift]:
        compared.append(step)
        return [Drift("dp", (0,), (), ("ln_f.bias",))]

    def error(drifts: list[Drift], **facts: Any) -> ReplicaError:
        return ReplicaError("ranks differ")

    run: Any = SimpleNamespace(
        config=None,
        replicas=SimpleNamespace(find=find, error=error),
        saver=SimpleNamespace(finish=lambda: None, published_step=-1),
        spikes=SimpleNamespace(see=lambda step, loss: Spike(29, 30, loss, 2.0) if loss > 2.0 else None),
        state=TrainState(step=30),
        watchdog=SimpleNamespace(at=lambda operation, step: None),
    )
    metrics: Any = SimpleNamespace(step=30, loss=1.0)
    go_back_if_loss_rose(run, metrics)
    assert compared == []  # steps without a spike do not pay for it
    with pytest.raises(ReplicaError, match="ranks differ"):
        go_back_if_loss_rose(run, SimpleNamespace(step=30, loss=9.0))  # type: ignore[arg-type]

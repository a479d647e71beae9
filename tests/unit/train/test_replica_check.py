"""What is compared of a rank's parameters, and which way back a run is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from megalm.models.gpt.build import build_model, plan_gpt
from megalm.parallel.replicas import Drift
from megalm.topology.group import Group
from megalm.topology.topology import Topology
from megalm.train.replica_check import ReplicaCheck, _held
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

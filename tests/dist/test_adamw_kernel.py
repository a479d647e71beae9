"""Whole runs in bf16 with the update in Triton, in its interpreter: what DeepSpeed holds is as with torch's update."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.config.root import Config
from tests.support import triton_device as support
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.skipif(not support.INSTALLED, reason=support.ABSENT)]

CLIP = 0.1
BOUND = 64 * 2.0**-24
"""Of one update's rounding in fp32, over the master's size and the rate's: tests/unit/kernels/test_adamw.py knows it."""


def config_of(**options: Any) -> Config:
    from tests.support.training import tiny_config

    config = tiny_config(zero_stage=1, dtype="bf16", hidden_dropout=0.0, attention_dropout=0.0, **options)
    return replace(config, training=replace(config.training, clip_grad=CLIP))


def kernels() -> dict[str, Any]:
    from megalm.kernels.adamw.oracle import TorchAdamW
    from megalm.kernels.adamw.triton_adamw import TritonAdamW

    return {"torch": TorchAdamW(), "triton": TritonAdamW()}


def as_it_should_be(owner: Any, rank: int) -> bool:
    """Whether this rank's weights are its masters, rounded, and no sum is left."""
    pairs = zip(owner.bf16_partitioned_groups, owner.fp32_groups_flat_partition, strict=True)
    rounded = all(torch.equal(parts[rank], master.detach().bfloat16()) for parts, master in pairs)
    return rounded and not any(flat.any() for flat in owner.fp32_groups_gradients_flat)


def agree(runs: list[Any]) -> bool:
    """Whether the masters of two runs are one update's rounding apart."""
    owners = [run.engine.raw.optimizer for run in runs]
    pairs = zip(*(owner.fp32_groups_flat_partition for owner in owners), strict=True)
    rate = owners[0].param_groups[0]["lr"]
    return all(((ours - theirs).abs() <= BOUND * (theirs.abs() + rate)).all() for ours, theirs in pairs)


def train_by_both(options: dict[str, Any]) -> dict[str, Any]:
    from tests.support.training import TinyRun

    found: dict[str, Any] = {}
    with support.triton_device():
        runs: list[Any] = []
        for name, kernel in kernels().items():
            run = TinyRun(config_of(**options), topology=runs[0].topology if runs else None, adamw=kernel)
            runs.append(run)
            losses = run.train(0, 1)
            found[name] = {"first": losses[0], "norm": float(run.engine.raw.get_global_grad_norm())}
        found["agree"] = agree(runs)
        for name, run in zip(kernels(), runs, strict=True):
            owner, rank = run.engine.raw.optimizer, run.topology.dp.rank
            found[name]["right"] = [as_it_should_be(owner, rank)]
            for step in range(1, 4):
                run.train(step, step + 1)
                found[name]["right"].append(as_it_should_be(owner, rank))
            before = run.digest()
            owner.fp32_groups_gradients_flat[0][-1 if rank else 0] = torch.nan
            run.train(4, 5)
            found[name]["left out"] = (run.engine.raw.skipped_steps, run.digest() == before)
            found[name]["right"].append(as_it_should_be(owner, rank))
            run.train(5, 6)
            found[name]["trains on"] = (run.engine.raw.skipped_steps, run.digest() != before)
            found[name]["right"].append(as_it_should_be(owner, rank))
            weights = [tuple(flat.tolist()) for flat in owner.bf16_groups_flat]
            found[name]["weights"] = (run.topology.tp.rank, *weights)
    return found


@pytest.mark.parametrize("world_size, options", [(1, {}), (2, {}), (4, {"tp": 2})], ids=["one", "dp2", "tp2-dp2"])
def test_masters_weights_and_sums_are_as_with_torchs_update(world_size: int, options: dict[str, Any]) -> None:
    outcomes = run_ranks(train_by_both, world_size, options)
    for found in outcomes:
        assert found["agree"]
        assert found["triton"]["first"] == found["torch"]["first"]
        assert found["triton"]["norm"] > CLIP
        for name in ("torch", "triton"):
            assert found[name]["right"] == [True] * 6
            assert found[name]["left out"] == (1, True)
            assert found[name]["trains on"] == (1, True)
    # Replicas have the same.
    assert len({found["triton"]["weights"] for found in outcomes}) == options.get("tp", 1)


def save_and_load_by_the_other(folder: str) -> list[dict[str, Any]]:
    from megalm.checkpoint.find import find_checkpoint
    from megalm.checkpoint.load import load_checkpoint
    from megalm.checkpoint.save import save_checkpoint
    from tests.support.training import TinyRun

    config, found, topology = config_of(), [], None
    with support.triton_device():
        for saving, loading in itertools.permutations(kernels()):
            run = TinyRun(config, topology=topology, adamw=kernels()[saving])
            topology = run.topology
            run.train(0, 3)
            save_checkpoint(
                run.engine.raw,
                f"{folder}/{saving}",
                {"step": 3, "consumed_samples": 12},
                config=config,
                topology=topology,
                rng=run.streams.state_dict(),
            )
            again = TinyRun(config, topology=topology, adamw=kernels()[loading])
            path = find_checkpoint(f"{folder}/{saving}", world=topology.world)
            load_checkpoint(again.engine.raw, path, config=config, topology=topology)
            same = again.digest() == run.digest()
            losses = [one.train(3, 4) for one in (run, again)]
            found.append({"same": same, "losses": losses, "agree": agree([again, run])})
    return found


def test_checkpoints_of_one_update_load_into_the_other(tmp_path: Path) -> None:
    for of_rank in run_ranks(save_and_load_by_the_other, 2, str(tmp_path)):
        for found in of_rank:
            assert found["same"]
            assert found["losses"][0] == found["losses"][1]
            assert found["agree"]

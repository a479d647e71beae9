"""B3: replicas stay equal to the last bit, and one bit that changes in one of them is found."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.faults.report import Figures
from tests.faults.trial import TP2, CleanRuns
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

FLIPS = 20


def train_then_flip(flags: list[str], num_steps: int) -> dict[str, list[list[str]]]:
    """Differences between replicas after many steps, and after each flip of a bit on one rank."""
    from megalm.config.parse import parse_command_line
    from megalm.parallel.replicas import replica_difference
    from megalm.train.build import prepare, running
    from megalm.train.loop import step

    with running(prepare(parse_command_line(flags))) as run:
        clipped = 0
        for _ in range(num_steps):
            clipped += (step(run).grad_norm or 0.0) > run.config.training.clip_grad
        assert clipped > num_steps // 2, f"only {clipped} of {num_steps} steps were clipped"
        named = list(run.engine.module.named_parameters())
        tp, dp = run.topology.tp, run.topology.dp

        def differences() -> list[str]:
            over_tp = replica_difference(named, tp)
            return sorted({*over_tp, *replica_difference(named, dp, include_sharded=True)})

        before = differences()
        found, flipped = [], []
        generator = random.Random(3)  # the same on every rank
        for _ in range(FLIPS):
            name, parameter = generator.choice(named)
            element, bit = generator.randrange(parameter.numel()), generator.randrange(32)
            victim = generator.randrange(run.topology.world.size)
            bits = parameter.data.view(-1).view(torch.int32)
            mask = torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
            if run.topology.world.rank == victim:
                bits[element] ^= mask
            found.append(differences())
            flipped.append([name])
            if run.topology.world.rank == victim:
                bits[element] ^= mask
        return {"before": [before], "found": found, "flipped": flipped, "after": [differences()]}


def test_replicas_stay_equal_and_a_flipped_bit_is_found(
    figures: Figures, clean_runs: CleanRuns, tmp_path: Path
) -> None:
    clean = clean_runs.of(replace(TP2, steps=15))
    flags = [
        *clean.command(tmp_path),
        "training.train_iters=200",
        "training.clip_grad=0.05",
        "--lr-decay-iters",
        "200",
    ]
    with figures.count("B3", "one flipped bit in one replica, after 200 clipped steps on TP2 x DP2") as count:
        outcomes = run_ranks(train_then_flip, 4, flags, 200)
        for outcome in outcomes:
            assert outcome["before"] == outcome["after"] == [[]]
        for flip in range(FLIPS):
            with count.case(f"flip {flip} of {outcomes[0]['flipped'][flip]}"):
                said = [name for outcome in outcomes for name in outcome["found"][flip]]
                assert set(said) == set(outcomes[0]["flipped"][flip])

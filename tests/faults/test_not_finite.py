"""G: a gradient that is not finite on one rank. All leave the update out, nothing changes, and the run ends after N."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.report import Figures
from tests.support.ranks import run_ranks
from tests.support.tiny_run import MODEL_FLAGS, TRAINING_FLAGS, write_corpus

pytestmark = pytest.mark.dist

OFFLOADED = "optimizer offloaded"
SETTINGS = {
    "TP2 x PP2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
    "TP2 x DP2 bf16": (4, ["--tensor-model-parallel-size", "2", "--bf16"]),
    "DP2": (2, []),
    "ZeRO-1": (2, ["--zero-stage", "1"]),
    "TP2 x DP2 ZeRO-1": (4, ["--tensor-model-parallel-size", "2", "--zero-stage", "1"]),
    "TP2 x DP2 ZeRO-2": (4, ["--tensor-model-parallel-size", "2", "--zero-stage", "2"]),
    "TP2 x DP2 ZeRO-3 bf16": (4, ["--tensor-model-parallel-size", "2", "--zero-stage", "3", "--bf16"]),
    "ZeRO-2 bf16 offloaded": (2, ["--zero-stage", "2", "--bf16", OFFLOADED]),
    "TP2 x PP2 bf16": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--bf16"]),
}
"""Processes and flags; the first two are the default suite."""
INJECTIONS = 5
MOST = 4
"""--max-skipped-steps."""


def inject(flags: list[str]) -> dict[str, Any]:
    """Train; now and then one rank's gradient of one parameter holds a NaN or infinity; at last in every step."""
    from megalm.config.parse import parse_command_line
    from megalm.errors import DivergedError
    from megalm.train.build import running
    from megalm.train.loop import step, train
    from megalm.train.prepare import prepare

    generator = random.Random(7)  # the same on every rank
    cases = []
    with running(prepare(parse_command_line(flags))) as run:
        rank = run.topology.world.rank
        parameters = [parameter for parameter in run.engine.module.parameters() if parameter.requires_grad]
        wrong: list[float] = []

        vectors = [parameter for parameter in parameters if len(getattr(parameter, "ds_shape", parameter.shape)) == 1]
        target = [vectors[0]]

        def spoil(vector: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
            if not wrong or vector is not target[0]:
                return gradient
            return gradient.index_fill(0, torch.zeros(1, dtype=torch.long), wrong[0])

        for vector in vectors:  # Shards and replicas, one after the other.
            vector.register_hook(functools.partial(spoil, vector))
        for injection in range(INJECTIONS):
            target[0] = vectors[injection % len(vectors)]
            losses = [step(run).loss for _ in range(generator.randrange(1, 4))]
            before, victim = digest(parameters), generator.randrange(run.topology.world.size)
            value = generator.choice((math.nan, math.inf, -math.inf))
            wrong += [value] if rank == victim else []
            left_out = step(run)
            wrong.clear()
            cases.append({
                "at": f"step {left_out.step}, rank {victim}, {value}",
                "left out": left_out.skipped,
                "untouched": digest(parameters) == before,
                "losses": [*losses, left_out.loss],
                "trains on": not step(run).skipped and digest(parameters) != before,
                "counted": run.state.skipped_steps,
            })  # fmt: skip
        before = digest(parameters)
        wrong += [math.nan] if rank == 1 else []
        last_good = run.state.step
        try:
            train(run)
            said = "trained to the end"
        except DivergedError as error:
            said = str(error)
        return {"cases": cases, "said": said, "last good": last_good, "untouched": digest(parameters) == before}


def digest(parameters: list[torch.nn.Parameter]) -> str:
    """sha256 of all values, in ZeRO-3 of this rank's."""
    found = hashlib.sha256()
    for parameter in parameters:
        found.update(getattr(parameter, "ds_tensor", parameter).detach().float().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_that_are_not_finite_change_nothing_on_any_rank(
    name: str, figures: Figures, full: bool, tmp_path: Path
) -> None:
    if not full and name not in list(SETTINGS)[:2]:
        pytest.skip("--full runs all settings")
    world_size, flags = SETTINGS[name]
    if OFFLOADED in flags:
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
        flags = [*flags[:-1], "--deepspeed_config", str(tmp_path / "ds.json")]
    data = ["--data-path", write_corpus(tmp_path), "--max-skipped-steps", str(MOST), "--train-iters", "60"]
    with figures.count("G", f"NaN or infinity in one rank's gradients, {name}: left out on all, then the end") as count:
        ranks = run_ranks(inject, world_size, [*MODEL_FLAGS, *TRAINING_FLAGS, *data, *flags])
        for injection in range(INJECTIONS):
            own = [outcome["cases"][injection] for outcome in ranks]
            with count.case(own[0]["at"]):
                for seen in ("left out", "untouched", "trains on"):
                    assert [case[seen] for case in own] == [True] * world_size, seen
                assert [case["counted"] for case in own] == [injection + 1] * world_size
                assert all(case["losses"] == own[0]["losses"] for case in own)
        with count.case(f"{MOST} in a row"):
            for outcome in ranks:
                first = outcome["last good"] + 1
                said = f"gradients were not finite in {MOST} steps in a row, {first} to {first + MOST - 1}"
                assert outcome["said"].startswith(said)
                assert outcome["untouched"]

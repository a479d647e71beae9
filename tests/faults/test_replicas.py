"""B3: replicas stay equal to the last bit, and a run ends before it saves one in which a bit has changed."""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.errors import ReplicaError
from tests.faults.report import Figures
from tests.faults.trial import DP2, PP2, TP2, Clean, CleanRuns, Setting, Trial
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

FLIPS = 20
INTERVAL = 5


def flip(parameter: torch.nn.Parameter, bit: int | None) -> None:
    """Change one bit, or none, of a parameter; under ZeRO-3 of this rank's part."""
    if bit is not None:
        data = getattr(parameter, "ds_tensor", parameter).data
        data.view(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8


def train_and_flip(flags: list[str], num_steps: int) -> dict[str, Any]:
    """Many steps without a flip; then flips on one rank, somewhere between two comparisons. Each ends the run, which is
    set back."""
    from megalm.checkpoint.restore import named_parameters
    from megalm.config.parse import parse_command_line
    from megalm.topology.agree import exchange
    from megalm.train import loop
    from megalm.train.build import running
    from megalm.train.prepare import prepare

    plain_step = loop.step
    with running(prepare(parse_command_line(flags))) as run:
        named = [(weight.name, parameter) for weight, parameter in named_parameters(run.engine.module)]
        tp, world = run.topology.tp, run.topology.world
        num_clipped = 0
        due: list[tuple[int, Callable[[], None]]] = []

        def step(run: Any) -> Any:
            nonlocal num_clipped
            metrics = plain_step(run)
            num_clipped += (metrics.grad_norm or 0.0) > run.config.training.clip_grad
            if due and due[0][0] == run.state.step:
                due.pop()[1]()
            return metrics

        def differing() -> set[str]:
            """Which parameters differ between ranks, by all their bytes."""
            own = {name: (p.partition_dim, hashlib.sha256(p.detach().numpy()).digest()) for name, p in named}
            everyone = exchange((tp.rank, own), world)
            return {
                name
                for name, p in named
                if len({own[name] for rank, own in everyone if p.partition_dim is None or rank == tp.rank}) > 1
            }

        loop.step = step
        run.stop.exit_interval = num_steps
        loop.train(run)
        run.stop.exit_interval = None
        before, clipped = differing(), num_clipped
        state = run.engine.raw.optimizer.state
        held = [tensor for _, p in named for tensor in (p.data, *state[p].values())]
        copies = [tensor.clone() for tensor in held]
        flips = []
        generator = random.Random(3)  # the same on every rank
        for _ in range(FLIPS):
            name, parameter = generator.choice(named)
            bit = generator.randrange(32 * parameter.numel())
            victim, after = generator.randrange(world.size), generator.randrange(1, INTERVAL)
            strike = functools.partial(flip, parameter, bit if world.rank == victim else None)
            began = run.state.step
            due.append((began + after, strike))
            said = "trained to the end"
            try:
                loop.train(run)
            except ReplicaError as error:
                said = str(error)
            flips.append({
                "what": f"bit {bit} of {name} on rank {victim}, after {after} steps",
                "name": name,
                "said": said,
                "differing": set().union(*exchange(differing(), world)),
                "steps": run.state.step - began,
            })  # fmt: skip
            for tensor, copy in zip(held, copies, strict=True):
                tensor.copy_(copy)
        return {"clipped": clipped, "before": before, "flips": flips, "after": differing()}


def test_replicas_stay_equal_and_a_flipped_bit_ends_the_run(
    figures: Figures, full: bool, clean_runs: CleanRuns, tmp_path: Path
) -> None:
    clean = clean_runs.of(replace(TP2, steps=15))
    own = {
        "training.train_iters": 1000,
        "training.clip_grad": 0.05,
        "training.check_replicas_interval": INTERVAL,
        "output.save_interval": 1000,
    }
    flags = [*clean.command(tmp_path), *(f"{path}={value}" for path, value in own.items())]
    num_steps = 200 if full else 50
    what = f"one flipped bit in one replica, TP2 x DP2, after {num_steps} clipped steps: found within {INTERVAL} steps"
    with figures.count("B3", what) as count:
        ranks = run_ranks(train_and_flip, 4, flags, num_steps)
        for outcome in ranks:
            assert outcome["clipped"] > num_steps // 2
            assert outcome["before"] == outcome["after"] == set()
        for number, flipped in enumerate(ranks[0]["flips"]):
            with count.case(flipped["what"]):
                assert flipped["name"] in flipped["differing"]
                num_names = len(flipped["differing"])
                assert f"differ in {num_names} parameter{'s' if num_names > 1 else ''} after" in flipped["said"]
                assert flipped["name"] in flipped["said"]
                assert flipped["steps"] <= INTERVAL
                assert [outcome["flips"][number]["said"] for outcome in ranks] == [flipped["said"]] * 4
    assert [path.name for path in tmp_path.glob("global_step*")] == [f"global_step{num_steps}"]


def flip_in_run(rank: int, whose: int, name: str, after: int) -> None:
    """One rank's copy of a parameter changes after a step."""
    from megalm.checkpoint.restore import named_parameters
    from megalm.train import loop

    plain_step = loop.step

    def step(run: Any) -> Any:
        metrics = plain_step(run)
        if (rank, run.state.step) == (whose, after):
            flip(next(p for weight, p in named_parameters(run.engine.module) if weight.name == name), 13)
        return metrics

    loop.step = step


TP2_BF16 = Setting("TP2 bf16", 2, ("--tensor-model-parallel-size", "2", "--bf16"))
TP2_ZERO3 = Setting("TP2 x DP2, ZeRO-3", 4, ("--tensor-model-parallel-size", "2", "--zero-stage", "3"))
CASES = {
    PP2: ("word_embeddings.weight", 12, "over pp, rank 0 .*, rank 1 .* differ: word_embeddings.weight"),
    TP2: ("h.1.input_layernorm.bias", 12, "over tp, rank 0 .*, rank 1 .* differ: .*h.1.input_layernorm.bias"),
    DP2: ("h.1.mlp.dense_4h_to_h.weight", 12, "over dp, rank 0 .*, rank 1 .* differ: h.1.mlp.dense_4h_to_h.weight"),
    # In what follows each update copies the weights from what the optimizer has.
    TP2_BF16: ("h.0.post_attention_layernorm.weight", 15, "over tp, rank 0 .*, rank 1 .* differ: h.0.post_attention"),
    TP2_ZERO3: ("ln_f.weight", 15, "over tp, rank 0 .*, rank 1 .* differ: ln_f.weight"),
}
"""A flip on rank 1, after which step, and what the message must have; the first is the default suite."""


def test_a_run_with_a_flipped_bit_saves_nothing_and_goes_on_from_before(
    figures: Figures, full: bool, clean_runs: CleanRuns, tmp_path: Path
) -> None:
    """No comparison but that before a save."""
    what = "one flipped bit, by program: exit code, message, nothing saved, and the undisturbed run from there"
    with figures.count("B3", what) as count:
        for setting, (name, after, said) in CASES.items():
            if not full and setting is not PP2:
                continue
            with count.case(f"{setting.name}, {name}"):
                folder = tmp_path / re.sub(r"\W+", "-", setting.name)
                trial = Trial(clean_runs.of(replace(setting, steps=20)), folder)
                ended = trial.run(prepare=flip_in_run, arguments=(1, name, after))
                assert ended.code == ReplicaError.exit_code, ended.output
                assert re.search(said, ended.output), ended.output
                assert f"go on with --load {folder}/global_step10" in ended.output
                assert trial.newest() == 10
                assert trial.run().code == 0
                (folder / "metrics.jsonl.discarded").unlink()  # The steps after the flip.
                trial.check_complete()


def test_a_checkpoint_whose_copies_differ_is_loaded_as_their_mean_with_a_warning(
    clean_runs: CleanRuns, tmp_path: Path
) -> None:
    """What a run saved that compared nothing."""
    trial = Trial(Clean(replace(TP2, steps=6), clean_runs.corpus, tmp_path), tmp_path / "run")
    name = "h.1.input_layernorm.bias"
    without = ("--check-replicas-interval", "0", "--exit-interval", "5")
    assert trial.run(*without, prepare=flip_in_run, arguments=(1, name, 5)).code == 75
    ended = trial.run("--log-level", "warning")
    assert ended.code == 0, ended.output
    assert f"different copies of 1 weight that tensor ranks should hold alike, {name} by" in ended.output

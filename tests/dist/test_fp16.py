"""fp16: the loss is scaled, an overflow on one rank leaves the update out on all, and the training is that of fp32."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny_run import MODEL_FLAGS, TRAINING_FLAGS, write_corpus

pytestmark = pytest.mark.dist

TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
# A norm of the first steps that is clipped, and of the later ones that is not.
FLAGS = ["--clip-grad", "0.9", "--train-iters", "9", "--lr-decay-iters", "20"]
FP16 = ["--fp16", "--initial-loss-scale", "256", "--loss-scale-window", "2"]
OVERFLOWS = (4, 5)
# It grows after steps 3, 8; of two overflows hysteresis lets the first pass.
SCALES = [256.0, 256.0, 512.0, 512.0, 256.0, 256.0, 256.0, 512.0, 512.0]
# fp16 rounds by 2^-11 = 4.9e-4 at most; in 20 steps of every layout losses and norms differed by 1.3e-4 of fp32's. Half
# the gradients in one update differ by 2e-3 and more.
RELATIVE = 5e-4


def _training(flags: list[str], victim: int, steps: tuple[int, ...]) -> tuple[list[tuple[Any, ...]], str]:
    """Loss, norm, scale of every step and whether it was left out, and how the run ended; in `steps` the gradient of a
    vector is infinite on rank `victim`."""
    import torch

    from megalm.config.parse import parse_command_line
    from megalm.errors import DivergedError
    from megalm.train.build import running
    from megalm.train.loop import train
    from megalm.train.prepare import prepare
    from tests.support.half import allow_fp16
    from tests.support.tiny_run import Collector

    allow_fp16()
    collector = Collector()
    with running(prepare(parse_command_line([*MODEL_FLAGS, *TRAINING_FLAGS, *flags]))) as run:

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            spoils = run.topology.world.rank == victim and run.state.step + 1 in steps
            return gradient.index_fill(0, torch.zeros(1, dtype=torch.long), math.inf) if spoils else gradient

        vectors = [p for p in run.engine.module.parameters() if len(getattr(p, "ds_shape", p.shape)) == 1]
        vectors[0].register_hook(spoil)
        run.sinks = [collector]
        try:
            train(run)
            said = "trained to the end"
        except DivergedError as error:
            said = str(error)
    return [(m.loss, m.grad_norm, m.loss_scale, m.skipped) for m in collector.steps], said


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(corpus: str) -> list[tuple[Any, ...]]:
    ((found, _),) = run_ranks(_training, 1, ["--data-path", corpus, *FLAGS], 0, OVERFLOWS)
    return found


@pytest.mark.parametrize(
    ("world_size", "flags", "victim"),
    [
        (4, [*TP2, *PP2, "--sequence-parallel"], 0),
        (2, ["--zero-stage", "2"], 1),
        (2, ["--zero-stage", "3", *TP2], 1),
    ],
    ids=["tp2-pp2", "zero2-dp2", "zero3-tp2"],
)
def test_fp16_trains_as_fp32_and_leaves_out_an_overflow_of_one_rank_on_all(
    world_size: int, flags: list[str], victim: int, corpus: str, reference: list[tuple[Any, ...]]
) -> None:
    ranks = run_ranks(_training, world_size, ["--data-path", corpus, *FLAGS, *FP16, *flags], victim, OVERFLOWS)
    losses, norms, _, _ = zip(*reference, strict=True)
    for steps, said in ranks:
        assert (steps, said) == (ranks[0][0], "trained to the end")
        assert [number for number, step in enumerate(steps, 1) if step[3]] == list(OVERFLOWS)
        assert [step[2] for step in steps] == SCALES
        np.testing.assert_allclose([step[0] for step in steps], losses, rtol=RELATIVE)
        kept = [place for place in range(len(steps)) if place + 1 not in OVERFLOWS]
        np.testing.assert_allclose([steps[place][1] for place in kept], [norms[place] for place in kept], rtol=RELATIVE)


def test_an_overflow_at_the_least_scale_ends_the_run_with_the_checkpoint_that_was_on_its_way(
    corpus: str, tmp_path: Path
) -> None:
    flags = ["--data-path", corpus, *FLAGS, "--fp16", "--initial-loss-scale", "256", "--min-loss-scale", "128", *PP2]
    flags += ["--save", str(tmp_path / "run"), "--save-interval", "3", "--async-save"]
    # The first overflow takes the scale to its least; that step is still being saved at the second.
    for steps, said in run_ranks(_training, 2, [*flags, "--hysteresis", "1"], 1, (3, 4)):
        assert [(scale, skipped) for _, _, scale, skipped in steps] == [(256.0, False)] * 2 + [(128.0, True)]
        assert said.startswith("gradients overflow in fp16 although the loss scale is at its least")
    assert (tmp_path / "run" / "latest").read_text() == "global_step3"


def test_overflows_in_a_row_at_a_fixed_scale_end_the_run(corpus: str) -> None:
    flags = ["--data-path", corpus, *FLAGS, "--fp16", "--loss-scale", "256", "--max-skipped-steps", "3"]
    ((steps, said),) = run_ranks(_training, 1, flags, 0, tuple(range(3, 20)))
    assert [(scale, skipped) for _, _, scale, skipped in steps] == [(256.0, False)] * 2 + [(256.0, True)] * 3
    assert "3 steps in a row, 3 to 5" in said
    assert "a lower --loss-scale or --lr" in said


def _scalers(folder: str) -> dict[str, dict[str, Any]]:
    """What the loss scaler is after a checkpoint of a run with another was loaded."""
    from megalm.checkpoint.find import find_checkpoint
    from megalm.checkpoint.load import load_checkpoint
    from megalm.checkpoint.save import save_checkpoint
    from tests.support.half import allow_fp16
    from tests.support.training import TinyRun, tiny_config

    allow_fp16()
    config = tiny_config(dtype="fp16")

    def run_with(**training: Any) -> TinyRun:
        return TinyRun(replace(config, training=replace(config.training, **training)), topology=topology)

    topology = None
    first = run_with(initial_loss_scale=256.0, loss_scale_window=2)
    topology = first.topology
    first.train(0, 3)
    save_checkpoint(first.engine.raw, folder, {"step": 3}, config=config, topology=topology)
    found = {"first": dict(vars(first.engine.raw.optimizer.loss_scaler))}
    others: dict[str, dict[str, Any]] = {
        "bounds": {"hysteresis": 1, "min_loss_scale": 4.0, "loss_scale_window": 7},
        "higher": {"min_loss_scale": 1024.0},
        "fixed": {"loss_scale": 64.0},
    }
    for name, training in others.items():
        run = run_with(**training)
        load_checkpoint(run.engine.raw, find_checkpoint(folder), config=config, topology=topology)
        found[name] = dict(vars(run.engine.raw.optimizer.loss_scaler))
    return found


def test_a_resumed_run_goes_on_with_the_scale_and_takes_its_own_options(tmp_path: Path) -> None:
    (found,) = run_ranks(_scalers, 1, str(tmp_path))
    first, bounds, higher, fixed = (found[name] for name in ("first", "bounds", "higher", "fixed"))
    assert (first["cur_scale"], first["cur_iter"]) == (512.0, 3)
    assert bounds == {**first, "min_scale": 4.0, "scale_window": 7, "delayed_shift": 1, "cur_hysteresis": 1}
    assert (higher["cur_scale"], higher["min_scale"], higher["cur_iter"]) == (1024.0, 1024.0, 3)
    assert (fixed["cur_scale"], fixed["dynamic"]) == (64.0, False)

"""ZeRO and bf16: other owners of the optimizer's state, or other arithmetic, and still the same training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.dist.test_layouts import RELATIVE, assert_same_training
from tests.support.ranks import run_ranks
from tests.support.tiny_run import RankOutcome, train_tiny, write_corpus

pytestmark = pytest.mark.dist

TP2 = ["--tensor-model-parallel-size", "2"]
# Steps of one, two and three micro-batches a replica of two; nothing of the tiny run's schedule, which counts steps.
GROWING = ["--rampup-batch-size", "4", "4", "24", "--global-batch-size", "12", "training.train_iters=none",
           "--train-samples", "84", "training.lr_warmup_iters=0"]  # fmt: skip
PP2 = ["--pipeline-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(corpus: str) -> RankOutcome:
    (outcome,) = run_ranks(train_tiny, 1, ["--data-path", corpus])
    return outcome


@pytest.fixture(scope="module")
def growing_reference(corpus: str) -> RankOutcome:
    (outcome,) = run_ranks(train_tiny, 1, ["--data-path", corpus, *GROWING])
    return outcome


@pytest.fixture(scope="module")
def bf16_reference(corpus: str) -> RankOutcome:
    (outcome,) = run_ranks(train_tiny, 1, ["--data-path", corpus, "--bf16"])
    return outcome


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (4, ["--zero-stage", "1", *PP2]),
        (4, ["--zero-stage", "1", *TP2, *PP2, "--sequence-parallel"]),
        (2, ["--zero-stage", "2"]),
        (4, ["--zero-stage", "2", *TP2]),
    ],
    ids=["zero1-pp2-dp2", "zero1-tp2-pp2-sp", "zero2-dp2", "zero2-tp2-dp2"],
)
def test_zero_trains_the_model_of_one_process(
    world_size: int, flags: list[str], corpus: str, reference: RankOutcome
) -> None:
    assert_same_training(run_ranks(train_tiny, world_size, ["--data-path", corpus, *flags]), reference)


@pytest.mark.parametrize("whole", [None, 0], ids=["small ones whole", "none whole"])
def test_zero3_has_the_losses_of_one_process(
    whole: int | None, corpus: str, reference: RankOutcome, tmp_path: Path
) -> None:
    flags = ["--data-path", corpus, "--zero-stage", "3", *TP2]
    if whole is not None:
        # By default parameters of up to 100,000 numbers stay whole on every rank: all of the tiny model.
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": whole}}))
        flags += ["--deepspeed_config", str(path)]
    # The losses of 20 steps depend on every weight.
    for outcome in run_ranks(train_tiny, 4, flags):
        np.testing.assert_allclose(outcome.losses, reference.losses, rtol=RELATIVE)
        np.testing.assert_allclose(outcome.grad_norms, reference.grad_norms, rtol=10 * RELATIVE)


def test_bf16_over_four_ranks_stays_by_fp32(corpus: str, reference: RankOutcome) -> None:
    outcomes = run_ranks(train_tiny, 4, ["--data-path", corpus, "--bf16", *TP2, *PP2])
    for outcome in outcomes:
        # One rounding to bf16 is 2^-9 relative; it passes through a few layers and 20 updates.
        np.testing.assert_allclose(outcome.losses, reference.losses, rtol=2e-2)


@pytest.mark.parametrize("axis", [TP2, PP2], ids=["tp2-dp2", "pp2-dp2"])
def test_bf16_norms_over_shards_of_replicas_are_those_of_one_process(
    axis: list[str], corpus: str, bf16_reference: RankOutcome
) -> None:
    for outcome in run_ranks(train_tiny, 4, ["--data-path", corpus, "--bf16", *axis]):
        # Of the first steps, while the weights are the same but for some roundings; a parameter that is left out or
        # counted twice changes the norm by more.
        np.testing.assert_allclose(outcome.grad_norms[:5], bf16_reference.grad_norms[:5], rtol=1e-2)
        np.testing.assert_allclose(outcome.losses, bf16_reference.losses, rtol=2e-2)


def _bf16_masters(flags: list[str]) -> tuple[set[str], set[str], float]:
    """Types of the weights and of the optimizer's copies after three steps, and how far a master is from its weight."""
    import torch

    from megalm.config.parse import parse_command_line
    from megalm.train.build import running
    from megalm.train.prepare import prepare
    from megalm.train.loop import step
    from tests.support.tiny_run import MODEL_FLAGS, TRAINING_FLAGS

    with running(prepare(parse_command_line([*MODEL_FLAGS, *TRAINING_FLAGS, *flags]))) as run:
        for _ in range(3):
            step(run)
        optimizer = run.engine.raw.optimizer
        masters = [p for group in optimizer.param_groups for p in group["params"]]
        weights = list(run.engine.module.parameters())
        gradients = {str(p._hp_grad.dtype) for p in weights}
        finer = max((master - master.bfloat16().float()).abs().max().item() for master in masters)
        assert {p.dtype for p in weights} == {torch.bfloat16}
        return {str(p.dtype) for p in masters}, gradients, finer


def test_bf16_keeps_fp32_masters_and_accumulates_gradients_in_fp32(corpus: str) -> None:
    ((masters, gradients, finer),) = run_ranks(_bf16_masters, 1, ["--data-path", corpus, "--bf16"])
    assert masters == {"torch.float32"}
    assert gradients == {"torch.float32"}
    assert finer > 0.0, "masters that equal their bf16 weights would have lost small updates"


def _sums_over_replicas() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The fp32 sums of bf16 gradients on this replica, and the part of them that its update reads."""
    from tests.support.training import TinyRun, tiny_config

    run = TinyRun(tiny_config(dtype="bf16", hidden_dropout=0.0, attention_dropout=0.0))
    raw, found = run.engine.raw, []
    reduce, step = raw._bf16_reduce_grads, raw.optimizer.step

    def reduce_grads() -> None:
        found.append([flat.numpy().copy() for flat in raw.optimizer.fp32_groups_gradients_flat])
        reduce()

    def update() -> None:
        found.append([part.numpy().copy() for part in raw.optimizer.fp32_groups_gradient_flat_partition])
        step()

    raw._bf16_reduce_grads, raw.optimizer.step = reduce_grads, update
    run.train(0, 1)
    own, averaged = found
    return own, averaged


@pytest.mark.parametrize("world_size", [1, 2])
def test_sums_of_bf16_gradients_are_averaged_over_replicas_in_fp32(world_size: int) -> None:
    outcomes = run_ranks(_sums_over_replicas, world_size)
    for group in range(2):
        averaged = np.concatenate([parts[group] for _, parts in outcomes])
        total = sum(own[group] for own, _ in outcomes)
        np.testing.assert_array_equal(averaged, total / np.float32(world_size))
        # bf16 keeps the upper 16 of the 32 bits.
        assert np.any(averaged.view(np.uint32) & 0xFFFF), "the sums went through bf16"


@pytest.mark.parametrize("stage, world_size", [("2", 1), ("2", 2), ("3", 2)])
def test_a_growing_batch_trains_the_same_under_zero(
    stage: str, world_size: int, corpus: str, growing_reference: RankOutcome
) -> None:
    outcomes = run_ranks(train_tiny, world_size, ["--data-path", corpus, *GROWING, "--zero-stage", stage])
    for outcome in outcomes:
        np.testing.assert_allclose(outcome.losses, growing_reference.losses, rtol=RELATIVE)
        np.testing.assert_allclose(outcome.grad_norms, growing_reference.grad_norms, rtol=10 * RELATIVE)


# Three blocks over three stages leave the head alone in the last, without a bias or a LayerNorm.
HEAD_ALONE = ["model.num_layers=3", "--pipeline-model-parallel-size", "3",
              "--pp-partition-method", "type:transformer|embedding"]  # fmt: skip


def test_zero1_updates_a_stage_of_matrices_alone(corpus: str) -> None:
    flags = ["--data-path", corpus, *HEAD_ALONE, "--zero-stage"]
    (alone,) = run_ranks(train_tiny, 1, [*flags, "0", "--pipeline-model-parallel-size", "1"])
    outcomes = run_ranks(train_tiny, 3, [*flags, "1"], timeout=120.0)
    assert all("norm" not in name and "bias" not in name for name in outcomes[2].weights), outcomes[2].weights.keys()
    assert_same_training(outcomes, alone)

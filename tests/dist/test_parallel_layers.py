"""Sharded layers and models equal dense ones, forward and gradients, on 1, 2 and 4 tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from megalm.topology.group import SOLO, Group
from megalm.topology.start import Launch, start
from tests.dist.overlap_cases import backward_events
from tests.dist.parallel_layer_cases import LAYER_CASES, run_layer_cases
from tests.dist.sharded_model_cases import MODEL_CASES, dropout_draws, run_model_cases
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

# fp32 sums in another order: some ten roundings of 6e-8 on sums of up to 32 terms of size 1.
LAYER_TOLERANCE = 2e-6
# bf16 gradients may round to neighbouring values where the fp32 ones before rounding differ in their last bits.
BF16_TOLERANCE = 2.0**-8
# Two blocks deep, and gradients of LayerNorms and biases are sums over 48 tokens.
MODEL_TOLERANCE = 1e-5


class Outcome(NamedTuple):
    """What one rank found."""

    layers: dict[str, float]
    models: dict[str, float]
    draws: tuple[list[float], list[float], list[float]]
    overlap: tuple[list[str], list[str]] | None


def run_all(tp: Group) -> Outcome:
    """Every case on this rank, in one process start."""
    overlap = None
    if tp.size > 1:
        overlap = backward_events(tp, sequence_parallel=False), backward_events(tp, sequence_parallel=True)
    return Outcome(run_layer_cases(tp), run_model_cases(tp), dropout_draws(tp), overlap)


def run_all_on_rank(tp_size: int) -> Outcome:
    """`run_all` with a tensor-parallel group of the whole world."""
    return run_all(start(Launch.from_environment(), tp=tp_size, pp=1, backend="gloo").tp)


@pytest.fixture(scope="module", params=[1, 2, 4], ids=["tp1", "tp2", "tp4"])
def outcomes(request: pytest.FixtureRequest) -> Iterator[list[Outcome]]:
    if request.param > 1:
        yield run_ranks(run_all_on_rank, request.param, request.param)
        return
    state = torch.get_rng_state()
    yield [run_all(SOLO)]
    torch.set_rng_state(state)


@pytest.mark.parametrize("case", LAYER_CASES)
def test_sharded_layer_matches_dense_forward_and_grad(outcomes: list[Outcome], case: str) -> None:
    allowed = 0.0 if case == "replica comparison" else BF16_TOLERANCE if "bf16" in case else LAYER_TOLERANCE
    for rank, outcome in enumerate(outcomes):
        assert outcome.layers[case] <= allowed, f"rank {rank}"


@pytest.mark.parametrize("case", MODEL_CASES)
def test_sharded_model_matches_one_rank_in_logits_loss_and_grad(outcomes: list[Outcome], case: str) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome.models[case] <= MODEL_TOLERANCE, f"rank {rank}"


def test_dropout_of_replicated_activations_agrees_and_of_sharded_ones_differs(outcomes: list[Outcome]) -> None:
    replicated, attention, sequence = zip(*(outcome.draws for outcome in outcomes), strict=True)
    assert all(draw == replicated[0] for draw in replicated)
    assert len({tuple(draw) for draw in attention}) == len(outcomes)
    assert len({tuple(draw) for draw in sequence}) == len(outcomes)


def test_backward_sends_while_it_computes_the_weight_gradient(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.overlap is None:
            assert len(outcomes) == 1
            continue
        reduced, sequence_parallel = outcome.overlap
        assert reduced == ["input gradient", "all-reduce starts", "weight gradient", "all-reduce is waited for"]
        assert sequence_parallel == [
            "all-gather starts",
            "input gradient",
            "reduce-scatter starts",
            "all-gather is waited for",
            "weight gradient",
            "reduce-scatter is waited for",
        ]

"""Sharded layers equal dense ones, forward and gradients, on 1, 2 and 4 tensor-parallel ranks."""

from __future__ import annotations

import pytest

from tests.dist.parallel_layer_cases import CASES, run_every_case
from tests.dist.sharded_model_cases import MODEL_CASES, run_every_model_case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

# fp32 sums in another order: some ten roundings of 6e-8 on sums of up to 32 terms of size 1.
TOLERANCE = 2e-6
# bf16 gradients may round to neighbouring values where the fp32 ones before rounding differ in their last bits.
BF16_TOLERANCE = 2.0**-8
EXACT = {"replica comparison"}


@pytest.fixture(scope="module", params=[1, 2, 4], ids=["tp1", "tp2", "tp4"])
def layer_results(request: pytest.FixtureRequest) -> list[dict[str, float]]:
    return run_ranks(run_every_case, request.param, request.param)


@pytest.mark.parametrize("case", CASES)
def test_sharded_layer_matches_dense_forward_and_grad(layer_results: list[dict[str, float]], case: str) -> None:
    allowed = 0.0 if case in EXACT else BF16_TOLERANCE if "bf16" in case else TOLERANCE
    for rank, results in enumerate(layer_results):
        assert results[case] <= allowed, f"rank {rank}"


@pytest.fixture(scope="module", params=[2, 4], ids=["tp2", "tp4"])
def model_results(request: pytest.FixtureRequest) -> list[dict[str, float]]:
    return run_ranks(run_every_model_case, request.param, request.param)


@pytest.mark.parametrize("case", MODEL_CASES)
def test_sharded_model_matches_one_rank_logits_loss_and_grad(model_results: list[dict[str, float]], case: str) -> None:
    # Two blocks deep; gradients of LayerNorms and biases are sums over 48 tokens.
    allowed = 1e-5
    for rank, results in enumerate(model_results):
        assert results[case] <= allowed, f"rank {rank}"


def test_dropout_of_replicated_activations_agrees_and_of_sharded_ones_differs() -> None:
    from tests.dist.sharded_model_cases import dropout_masks

    replicated, attention, sequence = zip(*run_ranks(dropout_masks, 2, 2), strict=True)
    assert replicated[0] == replicated[1]
    assert attention[0] != attention[1]
    assert sequence[0] != sequence[1]

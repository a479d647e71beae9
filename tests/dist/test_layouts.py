"""Every layout trains the model of one process: same losses, same gradient norms, same weights."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny_run import RankOutcome, consolidate, train_tiny, write_corpus

pytestmark = pytest.mark.dist

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1), (1, 1, 4)]
CASES = [
    (tp, pp, dp, sequence_parallel, recompute)
    for tp, pp, dp in LAYOUTS
    for sequence_parallel in ((False, True) if tp > 1 else (False,))
    for recompute in ("none", "full")
]
# Sums over ranks are rounded in another order than sums in one process: about 1e-7 a step in fp32, which 20 steps of
# Adam amplify. The issue of a wrong gradient or norm is far above: 1e-2 and more.
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(corpus: str) -> RankOutcome:
    (outcome,) = run_ranks(train_tiny, 1, ["--data-path", corpus])
    assert outcome.losses[-1] < outcome.losses[0] - 0.5, "the reference run must learn, or nothing is compared"
    return outcome


def _name(case: tuple[int, int, int, bool, str]) -> str:
    tp, pp, dp, sequence_parallel, recompute = case
    return f"{tp}{pp}{dp}{'-sp' if sequence_parallel else ''}{'-recompute' if recompute == 'full' else ''}"


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_twenty_steps_equal_one_process(
    case: tuple[int, int, int, bool, str], corpus: str, reference: RankOutcome
) -> None:
    tp, pp, dp, sequence_parallel, recompute = case
    flags = ["--data-path", corpus, "--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    flags += ["--recompute-granularity", recompute] + (["--sequence-parallel"] if sequence_parallel else [])
    if tp == 4:  # Half as many micro-batches, as gloo's many small messages take most of the time.
        flags += ["--micro-batch-size", "4"]
    outcomes = run_ranks(train_tiny, tp * pp * dp, flags)
    assert_same_training(outcomes, reference)


def assert_same_training(outcomes: list[RankOutcome], reference: RankOutcome) -> None:
    """Losses and gradient norms of every step, on every rank, and the weights after the last one."""
    for outcome in outcomes:
        np.testing.assert_allclose(outcome.losses, reference.losses, rtol=RELATIVE)
        np.testing.assert_allclose(outcome.grad_norms, reference.grad_norms, rtol=10 * RELATIVE)
    weights, expected = consolidate(outcomes), consolidate([reference])
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name], value, rtol=RELATIVE, atol=RELATIVE, err_msg=name)

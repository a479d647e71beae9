"""What --no-load-optim, --no-load-rng, --reset-progress and --finetune load and count, on the program itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny_run import RankOutcome, train_tiny, write_corpus

pytestmark = pytest.mark.dist

DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
NO_DROPOUT = ["--hidden-dropout", "0", "--attention-dropout", "0"]


def run_each(runs: dict[str, list[str]]) -> dict[str, RankOutcome]:
    """One run after the other in this process."""
    return {name: train_tiny([*flags, "--lr-decay-iters", "12"]) for name, flags in runs.items()}


def test_each_way_of_loading_takes_what_it_says_and_no_more(tmp_path: Path) -> None:
    data = ["--data-path", write_corpus(tmp_path)]
    random, plain = [*data, *DROPOUT], [*data, *NO_DROPOUT]
    load, five, two = ["--load", str(tmp_path / "run")], ["--train-iters", "5"], ["--train-iters", "2"]
    plain_load = ["--load", str(tmp_path / "plain")]
    runs = {
        "whole": [*random, *five],
        "saved": [*random, "--train-iters", "3", "--save", str(tmp_path / "run")],
        "resumed": [*random, *five, *load],
        "no optim": [*random, *five, *load, "--no-load-optim"],
        "no rng": [*random, *five, *load, "--no-load-rng"],
        "plain": [*plain, "--train-iters", "3", "--save", str(tmp_path / "plain")],
        "reset": [*plain, *two, *plain_load, "--reset-progress"],
        "finetune": [*plain, *two, *plain_load, "--finetune"],
        "fresh": [*plain, *two],
    }
    found = run_ranks(run_each, 1, runs)[0]
    losses = {name: outcome.losses for name, outcome in found.items()}
    whole = losses["whole"]
    assert losses["resumed"] == whole[3:]
    # The same weights and masks, so the same loss; then an update by moments that begin at zero.
    assert losses["no optim"][0] == whole[3]
    assert losses["no optim"][1] != whole[4]
    # The same weights under other masks.
    assert losses["no rng"][0] != whole[3]
    assert losses["no rng"][0] == pytest.approx(whole[3], abs=0.1)
    for name in ("resumed", "no optim", "no rng"):
        assert found[name].state == found["whole"].state, name
    # Both read the data from its beginning with the trained weights; one has the moments besides.
    assert losses["reset"][0] == losses["finetune"][0] < losses["fresh"][0]
    assert losses["reset"][1] != losses["finetune"][1]
    for name in ("reset", "finetune"):
        assert found[name].state == found["fresh"].state, name
        assert found[name].state["step"] == 2

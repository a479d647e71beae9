"""A checkpoint loaded into a model with other vocabulary padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.config.root import Config
from megalm.errors import CheckpointError
from tests.dist.test_checkpoint_layouts import consolidated
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

VOCAB_SIZE, STORED_ROWS, MORE_ROWS, FEWER_ROWS = 46, 48, 96, 40


def resize(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Save with 48 rows; load into 96 and save; load that into 48 again; load the first into 40."""
    from megalm.checkpoint.load import load_checkpoint
    from megalm.checkpoint.save import save_checkpoint
    from tests.support.training import TinyRun, tiny_config

    def configured(**model: int) -> Config:
        config = tiny_config(**options, **model)
        return replace(config, training=replace(config.training, seed=1))  # with which TinyRun draws weights

    config = configured()
    run = TinyRun(config)
    top = run.topology
    run.train(0, 2)
    first = save_checkpoint(run.engine.raw, f"{folder}/first", {"step": 2}, config=config, topology=top).path

    wide_config = configured(pad_vocab_size_to=MORE_ROWS)
    wide = TinyRun(wide_config, topology=top)
    fresh = save_checkpoint(wide.engine.raw, f"{folder}/fresh", {"step": 0}, config=wide_config, topology=top).path
    wide.train(0, 1)  # What the engine holds is not what is drawn.
    load_checkpoint(wide.engine.raw, first, config=wide_config, topology=top)
    more = save_checkpoint(wide.engine.raw, f"{folder}/more", {"step": 2}, config=wide_config, topology=top).path
    losses = wide.train(2, 4)

    load_checkpoint(run.engine.raw, more, config=config, topology=top)
    back = save_checkpoint(run.engine.raw, f"{folder}/back", {"step": 2}, config=config, topology=top).path
    few_config = configured(pad_vocab_size_to=FEWER_ROWS)
    refused = ""
    try:
        load_checkpoint(TinyRun(few_config, topology=top).engine.raw, first, config=few_config, topology=top)
    except CheckpointError as error:
        refused = str(error)
    return {"first": first, "fresh": fresh, "more": more, "back": back, "losses": losses, "refused": refused}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_added_rows_are_those_of_a_fresh_run_and_the_true_vocabulary_is_never_cut(tmp_path: Path, dtype: str) -> None:
    # tp 2: half of 96 rows are 48, as many as the whole that was stored.
    options = {"tp": 2, "zero_stage": 1, "dtype": dtype}
    outcome = run_ranks(resize, 2, str(tmp_path), options)[0]
    first, more, back = (consolidated(outcome[name]) for name in ("first", "more", "back"))
    fresh = consolidated_weights(outcome["fresh"])
    for name, tensor in more.items():
        if not name.startswith("word_embeddings.weight") or name.endswith("step"):
            assert torch.equal(tensor, first[name]), name
            continue
        assert torch.equal(tensor[:STORED_ROWS], first[name]), name
        added = tensor[STORED_ROWS:]
        if name == "word_embeddings.weight":
            assert torch.equal(added, fresh[name][STORED_ROWS:])
            assert added.std() > 0.1
        else:
            assert added.abs().max() == 0, name
    weights = consolidated_weights(outcome["more"])["word_embeddings.weight"]
    assert torch.equal(weights[STORED_ROWS:], more["word_embeddings.weight"][STORED_ROWS:])
    assert all(torch.equal(tensor, first[name]) for name, tensor in back.items())
    assert all(float.fromhex(loss) < 10 for loss in outcome["losses"])
    assert f"{VOCAB_SIZE} ids in the checkpoint, {FEWER_ROWS} rows in this run" in outcome["refused"]


def consolidated_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What the layer files hold, as fp32."""
    from megalm.checkpoint.source import open_checkpoint

    return {weight.name: tensor.float() for weight, tensor in open_checkpoint(folder).layers.iterate()}

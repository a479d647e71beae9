from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint.export import export_checkpoint
from megalm.checkpoint.pretrained import load_pretrained
from megalm.errors import CheckpointError
from tests.support.checkpoints import bloom_config, write_checkpoint

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "c", bloom_config())
    export_checkpoint(tmp_path / "c", tmp_path / "hf")
    return tmp_path / "hf"


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"eos_token_id": "a"}, "holds no model that transformers reads: .*eos_token_id"),
        ({"n_layer": 3}, r"reports missing keys in .*: transformer\.h\.2\..*\n  its weights are not those"),
        ({"n_layer": 1}, r"reports unexpected keys in .*: transformer\.h\.1\."),
        ({"vocab_size": 40}, "holds no model that transformers reads"),
        ({"model_type": "none"}, "holds no model that transformers reads"),
    ],
)
def test_a_model_that_is_not_the_folders_is_refused(folder: Path, fields: dict[str, Any], words: str) -> None:
    change(folder / "config.json", **fields)
    with pytest.raises(CheckpointError, match=words):
        load_pretrained(folder, dtype=torch.float32)


def test_a_damaged_file_is_an_answer(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="holds no model that transformers reads: "):
        load_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("drew", [True, False])
def test_loading_says_nothing_and_leaves_transformers_as_it_was(
    folder: Path, drew: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    (logging.enable_progress_bar if drew else logging.disable_progress_bar)()
    logging.set_verbosity(logging.INFO)
    change(folder / "config.json", eos_token_id=[0, 1])
    try:
        assert load_pretrained(folder, dtype=torch.float32).dtype == torch.float32
        assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (drew, logging.INFO)
    finally:
        (logging.enable_progress_bar if before[0] else logging.disable_progress_bar)()
        logging.set_verbosity(before[1])
    assert "".join(capsys.readouterr()) == ""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megalm.checkpoint import layout
from megalm.checkpoint.draft import Draft
from megalm.checkpoint.identity import read_config
from megalm.checkpoint.retention import Retention
from megalm.checkpoint.run_tokenizer import tokenizer_of_run
from megalm.checkpoint.source import open_checkpoint
from megalm.checkpoint.split import write_layer_files
from megalm.config.root import Config
from megalm.config.yaml_file import config_from_yaml
from megalm.data.indexed import sidecar_path
from megalm.data.indexed_writer import IndexedWriter
from megalm.errors import DataError
from megalm.tokenizers.build import open_tokenizer
from megalm.tokenizers.probe import probe_ids
from megalm.topology.layout import Layout
from tests.support.checkpoints import bloom_config, random_weights, write_checkpoint
from tests.support.tokenizer_folder import write_tokenizer


def with_data(config: Config, **fields: object) -> Config:
    return replace(config, data=replace(config.data, **fields))  # type: ignore[arg-type]


def swap_two_letters(folder: Path) -> None:
    """Make another tokenizer of the same size of the one in a folder."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    letters = content["model"]["vocab"]
    letters["a"], letters["b"] = letters["b"], letters["a"]
    file.write_text(json.dumps(content))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A checkpoint of a run on a corpus, beside two tokenizers: `own` made the corpus, `other` is of the same size."""
    size = write_tokenizer(tmp_path / "own")
    write_tokenizer(tmp_path / "other")
    swap_two_letters(tmp_path / "other")
    prefix = str(tmp_path / "corpus")
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add_document(np.arange(99))
    own = open_tokenizer("PretrainedFromHF", path=str(tmp_path / "own"))
    made_with = {"type": "PretrainedFromHF", "digest": own.digest, "vocab_size": size, "probe": probe_ids(own)}
    sidecar = sidecar_path(prefix)
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "tokenizer": made_with}))
    config = with_data(
        bloom_config(vocab_size=size), tokenizer_path=str(tmp_path / "own"), data_path=("0.5", prefix, "0.5", "gone")
    )
    write_checkpoint(tmp_path / "c", config)
    return tmp_path / "c"


def test_the_runs_own_and_a_given_one_that_made_its_corpus_are_taken(run: Path) -> None:
    for given in (None, str(run.parent / "own")):
        tokenizer = tokenizer_of_run(open_checkpoint(run), read_config(run), given=given)
        assert tokenizer is not None
        assert tokenizer.eod_id == 256
    assert tokenizer_of_run(open_checkpoint(run), None) is None


def test_another_one_of_the_same_size_is_refused(run: Path) -> None:
    source, config = open_checkpoint(run), read_config(run)
    with pytest.raises(DataError, match="makes other ids of the same text than the tokenizer of the run's .*corpus"):
        tokenizer_of_run(source, config, given=str(run.parent / "other"))
    swap_two_letters(run.parent / "own")
    with pytest.raises(DataError, match="makes other ids"):
        tokenizer_of_run(source, config)
    sidecar_path(str(run.parent / "corpus")).unlink()
    said: list[str] = []
    assert tokenizer_of_run(source, config, warn=said.append) is not None
    assert said == []
    assert tokenizer_of_run(source, config, given=str(run.parent / "other"), warn=said.append) is not None
    assert "nothing here tells whether" in said[0]


def test_ids_without_a_row_are_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    write_checkpoint(tmp_path / "c", bloom_config(vocab_size=48))
    with pytest.raises(DataError, match="has 257 ids, and the model has 48 rows of word embedding"):
        tokenizer_of_run(open_checkpoint(tmp_path / "c"), None, given=str(tmp_path / "tokenizer"))


def test_null_tokenizer_ends_documents_with_the_id_that_it_trained_with(tmp_path: Path) -> None:
    # 96 ids, and one more that ends documents: what the model of such a run counts.
    config = with_data(bloom_config(vocab_size=97), tokenizer_type="NullTokenizer")
    draft = Draft.of(tmp_path, {"step": 3}, config=config, sizes=Layout(tp=1, pp=1, dp=1), retention=Retention())
    draft.begin()
    draft.publish(write_layer_files(draft.temporary, random_weights(config), tp_size=1))
    folder = tmp_path / "global_step3"
    assert read_config(folder) == config
    given_again = config_from_yaml((folder / layout.CONFIG).read_text())
    assert given_again.model.vocab_size == 96
    tokenizer = tokenizer_of_run(open_checkpoint(folder), read_config(folder))
    assert tokenizer is not None
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (96, 97)

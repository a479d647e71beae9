"""A corpus is held against the run's tokenizer: by files, then by the ids of one text, then by a warning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.config.data import DataConfig
from megalm.data.build import build_datasets, open_corpora
from megalm.data.indexed import IndexedDataset, sidecar_path
from megalm.data.indexed_writer import IndexedWriter
from megalm.data.same_tokenizer import TokenizerFacts, check_tokenizer
from megalm.errors import DataError
from megalm.tokenizers.huggingface import HuggingFaceTokenizer
from megalm.tokenizers.null import NullTokenizer
from megalm.tokenizers.probe import PROBE, probe_ids
from tests.support.token_files import write_by_description
from tests.support.tokenizer_folder import write_tokenizer

RUN = TokenizerFacts("tokenizer/tokenizer.json", 257, "digest", (1, 2, 3))


def corpus(folder: Path, made_with: dict[str, Any] | None) -> str:
    prefix = str(folder / "corpus")
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(20):
            writer.add_document(np.arange(9))
    if made_with is not None:
        sidecar = sidecar_path(prefix)
        sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "tokenizer": made_with}))
    return prefix


@pytest.mark.parametrize(
    "made_with",
    [
        None,
        {"type": "PretrainedFromHF", "digest": "digest", "vocab_size": 257},
        {"type": "GPT2BPETokenizer", "digest": "another format's", "vocab_size": 257, "probe": [1, 2, 3]},
        {"type": "NullTokenizer", "digest": "of a number", "vocab_size": 9, "probe": None},
    ],
    ids=["another trainer's", "same files", "same ids", "ids as they are"],
)
def test_nothing_is_said_of_a_corpus_of_the_same_tokenizer(made_with: dict[str, Any] | None, tmp_path: Path) -> None:
    assert check_tokenizer(IndexedDataset(corpus(tmp_path, made_with)), RUN) is None


def test_ends_of_documents_that_were_never_written_are_told(tmp_path: Path) -> None:
    prefix = corpus(tmp_path, None)
    data = DataConfig(seq_length=8, data_path=(prefix,), reset_attention_mask=True)
    assert open_corpora(data)[1] == []
    sidecar = sidecar_path(prefix)
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "append_eod": False}))
    (warning,) = open_corpora(data)[1]
    assert "without --append-eod, so that data.reset_attention_mask finds no end" in warning
    assert open_corpora(replace(data, reset_attention_mask=False))[1] == []


def test_another_tokenizer_is_refused_by_the_ids_it_makes(tmp_path: Path) -> None:
    made_with = {"type": "SentencePieceTokenizer", "digest": "other", "vocab_size": 300, "probe": [1, 2, 4]}
    prefix = corpus(tmp_path, made_with)
    with pytest.raises(DataError, match="tokenized by a SentencePieceTokenizer of 300 ids, which makes other ids"):
        check_tokenizer(IndexedDataset(prefix), RUN)
    with pytest.raises(DataError, match="makes other ids"):
        build_datasets(DataConfig(seq_length=8, data_path=(prefix,)), num_samples={"train": 2}, seed=0, tokenizer=RUN)
    as_they_are = replace(RUN, probe=None)
    assert check_tokenizer(IndexedDataset(prefix), as_they_are) is None


def test_where_only_the_files_differ_it_is_a_warning(tmp_path: Path) -> None:
    prefix = corpus(tmp_path, {"type": "PretrainedFromHF", "digest": "other", "vocab_size": 257})
    found = build_datasets(
        DataConfig(seq_length=8, data_path=(prefix,)), num_samples={"train": 2}, seed=0, tokenizer=RUN
    )
    assert [warning for warning in found.warnings if "if it is another tokenizer, so are its tokens" in warning]


def test_the_probe_tells_tokenizers_apart_and_formats_not(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "one")
    one = HuggingFaceTokenizer(str(tmp_path / "one"))
    written_again = json.loads((tmp_path / "one" / "tokenizer.json").read_text())
    (tmp_path / "same").mkdir()
    (tmp_path / "same" / "tokenizer.json").write_text(json.dumps(written_again, indent=7))
    same = HuggingFaceTokenizer(str(tmp_path / "same"))
    letters = written_again["model"]["vocab"]
    letters["a"], letters["b"] = letters["b"], letters["a"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(written_again))
    other = HuggingFaceTokenizer(str(tmp_path / "other"))
    assert same.digest != one.digest
    assert probe_ids(same) == probe_ids(one) != probe_ids(other)
    assert probe_ids(NullTokenizer(9)) is None
    assert one.decode(probe_ids(one) or []) == PROBE


def test_verification_finds_ids_that_only_pad_the_vocabulary(tmp_path: Path) -> None:
    write_by_description(tmp_path / "bare", [[[1, 2, 3, 300, 5, 6, 7, 8, 9]]])
    data = DataConfig(seq_length=8, data_path=(str(tmp_path / "bare"),), split="1,0,0", verify_data=True)
    words = "sequence 0, token 3, is 300, outside of the vocabulary of 257\n  another tokenizer made the corpus"
    with pytest.raises(DataError, match=words):
        build_datasets(data, num_samples={"train": 1}, seed=0, vocab_size=384, tokenizer=RUN)
    with pytest.raises(DataError, match=words):
        open_corpora(data, tokenizer=RUN)
    build_datasets(data, num_samples={"train": 1}, seed=0, vocab_size=384)

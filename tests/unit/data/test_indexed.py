from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.indexed import DTYPE_CODES, IndexedDataset, best_dtype
from megalm.data.indexed_writer import IndexedWriter
from megalm.errors import DataError
from tests.support.damaged_corpora import DOCUMENTS, INDEX_FAULTS
from tests.support.token_files import read_by_description, write_by_description


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_by_description(tmp_path / "corpus", DOCUMENTS)
    return tmp_path / "corpus"


LARGEST = {1: 255, 2: 127, 3: 2**15 - 1, 4: 2**31 - 1, 5: 2**63 - 1, 8: 2**16 - 1}
"""Dtype codes of the format that mean integers, and the largest id of each."""


@st.composite
def corpora(draw: st.DrawFn) -> tuple[int, list[list[list[int]]]]:
    """A dtype code, and documents of sentences of ids that fit it."""
    code = draw(st.sampled_from(sorted(LARGEST)))
    ids = st.one_of(st.integers(0, LARGEST[code]), st.sampled_from([0, LARGEST[code]]))
    sentence = st.lists(ids, min_size=1, max_size=5)
    return code, draw(st.lists(st.lists(sentence, min_size=1, max_size=3), max_size=6))


@given(corpora())
@settings(max_examples=60, deadline=None)
def test_what_we_write_an_independent_reader_reads(
    tmp_path_factory: pytest.TempPathFactory, corpus: tuple[int, list]
) -> None:
    code, docs = corpus
    prefix = tmp_path_factory.mktemp("w") / "corpus"
    with IndexedWriter(prefix, DTYPE_CODES[code]) as writer:
        for document in docs:
            writer.add_sentences(document)
    assert read_by_description(prefix) == docs
    assert Path(f"{prefix}.idx").read_bytes()[17] == code


@given(corpora())
@settings(max_examples=60, deadline=None)
def test_what_an_independent_writer_writes_we_read(
    tmp_path_factory: pytest.TempPathFactory, corpus: tuple[int, list]
) -> None:
    code, docs = corpus
    prefix = tmp_path_factory.mktemp("r") / "corpus"
    write_by_description(prefix, docs, code=code)
    indexed = IndexedDataset(prefix)
    flat = [sequence for document in docs for sequence in document]
    assert [indexed.get(i).tolist() for i in range(len(indexed))] == flat
    assert [indexed.document(i).tolist() for i in range(indexed.num_documents)] == [sum(d, []) for d in docs]


def test_writer_is_byte_identical_to_the_format(tmp_path: Path, prefix: Path) -> None:
    with IndexedWriter(tmp_path / "ours", "u2") as writer:
        for document in DOCUMENTS:
            writer.add_sentences(document)
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path}/ours{suffix}").read_bytes() == Path(f"{prefix}{suffix}").read_bytes()


def test_part_of_a_sequence(prefix: Path) -> None:
    indexed = IndexedDataset(prefix)
    assert indexed.get(3, offset=1, length=2).tolist() == [8, 9]
    assert indexed.get(3, offset=4).tolist() == []
    for bad in ((4, 0, 1), (-1, 0, 1), (0, 0, 4), (0, 4, 0), (0, -1, 2)):
        with pytest.raises(IndexError):
            indexed.get(*bad)


def test_tokens_are_read_only_and_pickling_opens_the_files_again(prefix: Path) -> None:
    indexed = IndexedDataset(prefix)
    with pytest.raises(ValueError, match="read-only"):
        indexed.get(0)[0] = 9
    raw = pickle.dumps(indexed)
    assert len(raw) < 500
    assert pickle.loads(raw).get(2).tolist() == [5, 6]


def write(prefix: Path, docs: list[list[int]]) -> None:
    with IndexedWriter(prefix, "u2", overwrite=True) as writer:
        for ids in docs:
            writer.add_document(ids)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, "u2"), (65_500, "i4"), (250_880, "i4"), (1, "u2")])
def test_dtype_is_chosen_like_in_the_other_trainers(vocab_size: int, dtype: str) -> None:
    assert best_dtype(vocab_size) == np.dtype(dtype)


@pytest.mark.parametrize("ids", [[65_536], [-1], [3, 70_000, 4]])
def test_id_that_does_not_fit_is_refused_and_nothing_is_published(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(DataError, match="does not fit uint16"):
        write(tmp_path / "c", [[1, 2], ids])
    assert list(tmp_path.iterdir()) == []


def test_id_outside_of_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="id 100 lies outside"),
        IndexedWriter(tmp_path / "c", "u2", vocab_size=100) as w,
    ):
        w.add_document([99, 100])


def test_existing_corpus_is_not_overwritten_unless_asked(tmp_path: Path, prefix: Path) -> None:
    before = Path(f"{prefix}.bin").read_bytes()
    with pytest.raises(DataError, match="exists already"), IndexedWriter(prefix, "u2") as writer:
        writer.add_document([1])
    assert Path(f"{prefix}.bin").read_bytes() == before
    with IndexedWriter(prefix, "u2", overwrite=True) as writer:
        writer.add_document([1])
    assert IndexedDataset(prefix).num_tokens == 1


def test_unwritable_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"), IndexedWriter(tmp_path / "file" / "c", "u2") as writer:
        writer.add_document([1])


def test_failure_leaves_the_old_corpus_whole(tmp_path: Path, prefix: Path) -> None:
    with pytest.raises(DataError):
        write(prefix, [[1], [70_000]])
    assert read_by_description(prefix) == DOCUMENTS
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".idx"]


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_each_fault_of_the_files_has_its_own_error(prefix: Path, fault: str) -> None:
    damage, message = INDEX_FAULTS[fault]
    damage(prefix)
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


def test_missing_corpus_error_names_what_lies_in_the_folder(prefix: Path) -> None:
    with pytest.raises(DataError, match=f"corpora in .*: {prefix}"):
        IndexedDataset(f"{prefix}_typo")
    with pytest.raises(DataError, match="without its suffix"):
        IndexedDataset(f"{prefix}.bin")

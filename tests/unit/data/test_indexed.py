from __future__ import annotations

import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.indexed import IndexedDataset, best_dtype
from megalm.data.indexed_writer import IndexedWriter
from megalm.errors import DataError
from tests.support.token_files import read_by_description, write_by_description

DOCUMENTS = [[[1, 2, 3], [4]], [[5, 6]], [[7, 8, 9, 10]]]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_by_description(tmp_path / "corpus", DOCUMENTS)
    return tmp_path / "corpus"


documents = st.lists(
    st.lists(st.lists(st.integers(0, 60_000), min_size=1, max_size=5), min_size=1, max_size=3), max_size=6
)


@given(documents)
@settings(max_examples=25, deadline=None)
def test_what_we_write_an_independent_reader_reads(tmp_path_factory: pytest.TempPathFactory, docs: list) -> None:
    prefix = tmp_path_factory.mktemp("w") / "corpus"
    with IndexedWriter(prefix, "u2") as writer:
        for document in docs:
            writer.add_sentences(document)
    assert read_by_description(prefix) == docs


@given(documents, st.sampled_from([4, 5, 8]))
@settings(max_examples=25, deadline=None)
def test_what_an_independent_writer_writes_we_read(
    tmp_path_factory: pytest.TempPathFactory, docs: list, code: int
) -> None:
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


def edit(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def apply(prefix: Path) -> None:
        path = Path(f"{prefix}.idx")
        raw = bytearray(path.read_bytes())
        result = change(raw)
        path.write_bytes(bytes(result) if isinstance(result, bytes | bytearray) else bytes(raw))

    return apply


def put(form: str, at: int, value: int) -> Callable[[Path], None]:
    return edit(lambda raw: struct.pack_into(form, raw, at, value))


def resize_bin(change: int) -> Callable[[Path], None]:
    def apply(prefix: Path) -> None:
        path = Path(f"{prefix}.bin")
        raw = path.read_bytes()
        path.write_bytes(raw[:change] if change < 0 else raw + bytes(change))

    return apply


LENGTHS, POINTERS, BOUNDS = 34, 34 + 16, 34 + 16 + 32
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "legacy magic": (edit(lambda raw: b"TNTIDX\x00\x00" + raw[8:]), "legacy TNTIDX"),
    "other magic": (edit(lambda raw: b"X" + raw[1:]), "is no token index"),
    "empty index": (edit(lambda raw: b""), "is no token index"),
    "cut in the magic": (edit(lambda raw: raw[:5]), "cut off in its header"),
    "cut in the header": (edit(lambda raw: raw[:20]), "cut off in its header"),
    "version": (put("<Q", 9, 2), "version 2 is unknown"),
    "dtype code 0": (put("<B", 17, 0), "dtype code 0"),
    "float dtype": (put("<B", 17, 6), "dtype code 6"),
    "other dtype": (put("<B", 17, 4), "starts at byte 6, the lengths before it say 12"),
    "too many sequences": (put("<Q", 18, 5), "need 126 bytes, the file has 114"),
    "absurd sequences": (put("<Q", 18, 2**62), "the file has 114"),
    "too few bounds": (put("<Q", 26, 3), "need 106 bytes, the file has 114"),
    "cut index": (edit(lambda raw: raw[:-3]), "the file has 111"),
    "negative length": (put("<i", LENGTHS, -1), "sequence 0 has length -1"),
    "wrong length": (put("<i", LENGTHS + 4, 2), "sequence 2 starts at byte 8, the lengths before it say 10"),
    "first pointer": (put("<q", POINTERS, 2), "sequence 0 starts at byte 2"),
    "pointer": (put("<q", POINTERS + 16, 6), "sequence 2 starts at byte 6"),
    "first bound": (put("<q", BOUNDS, 1), "first document bound is 1"),
    "falling bounds": (put("<q", BOUNDS + 8, 4), "document bound 2 is 3, below the one before, 4"),
    "last bound": (put("<q", BOUNDS + 24, 5), "last document bound is 5; it must be 4"),
    "longer bin": (resize_bin(2), "describes 20 bytes of tokens, .* has 22"),
    "cut bin": (resize_bin(-2), "describes 20 bytes of tokens, .* has 18"),
    "odd bin": (resize_bin(1), "no multiple of 2"),
    "no bin": (lambda prefix: Path(f"{prefix}.bin").unlink(), "bin missing"),
    "no index": (lambda prefix: Path(f"{prefix}.idx").unlink(), "idx missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_the_files_has_its_own_error(prefix: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    damage(prefix)
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


def test_missing_corpus_error_names_what_lies_in_the_folder(prefix: Path) -> None:
    with pytest.raises(DataError, match=f"corpora in .*: {prefix}"):
        IndexedDataset(f"{prefix}_typo")
    with pytest.raises(DataError, match="without its suffix"):
        IndexedDataset(f"{prefix}.bin")


def test_mutated_indexes_give_an_error_or_the_right_tokens(tmp_path: Path) -> None:
    """Bit flips, cut tails and overwritten runs of an index without a checksum: no crash, no wrong token in silence.

    Flips in the document bounds move documents' borders, which nothing but a checksum can tell; tokens stay right.
    """
    prefix = tmp_path / "corpus"
    write_by_description(prefix, DOCUMENTS)
    good = Path(f"{prefix}.idx").read_bytes()
    sequences = [sequence for document in DOCUMENTS for sequence in document]
    draw = random.Random(0)
    refused = 0
    for _ in range(2_000):
        raw = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        if draw.random() < 0.2:
            raw = raw[: draw.randrange(len(raw))]
        Path(f"{prefix}.idx").write_bytes(raw)
        try:
            indexed = IndexedDataset(prefix)
        except DataError:
            refused += 1
            continue
        assert [indexed.get(i).tolist() for i in range(len(indexed))] == sequences
    assert refused > 1_500

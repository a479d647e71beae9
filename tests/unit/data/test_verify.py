from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megalm.data.indexed_writer import IndexedWriter
from megalm.data.merge import merge_datasets
from megalm.data.verify import verify_corpus
from megalm.errors import DataError
from tests.support.token_files import write_by_description


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    draw = np.random.default_rng(0)
    with IndexedWriter(tmp_path / "c", "u2") as writer:
        for _ in range(40):
            writer.add_document(draw.integers(0, 500, draw.integers(1, 30)))
    return str(tmp_path / "c")


def flip(suffix: str, at: int) -> Callable[[str], None]:
    def apply(prefix: str) -> None:
        path = Path(prefix + suffix)
        raw = bytearray(path.read_bytes())
        raw[at] ^= 1
        path.write_bytes(raw)

    return apply


def test_whole_corpus_is_said_to_be_whole(prefix: str) -> None:
    found = verify_corpus(prefix, vocab_size=500)
    assert (found.documents, found.hashed, found.vocab_size) == (40, True, 500)
    assert 480 < found.largest_id < 500


@pytest.mark.parametrize("at", range(0, 600, 37))
def test_any_flipped_bit_of_the_tokens_is_found(prefix: str, at: int) -> None:
    flip(".bin", at)(prefix)
    with pytest.raises(DataError, match="c.bin does not have the sha256"):
        verify_corpus(prefix)


@pytest.mark.parametrize("at", [*range(34), 40, 200, 600, -1, -9])
def test_any_flipped_bit_of_the_index_is_found(prefix: str, at: int) -> None:
    flip(".idx", at)(prefix)
    with pytest.raises(DataError, match="c.idx"):
        verify_corpus(prefix)


def cut_bin(prefix: str) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-2])


def break_sidecar(prefix: str) -> None:
    Path(f"{prefix}.meta.json").write_text('{"files": {}}')


@pytest.mark.parametrize(
    ("damage", "message"), [(cut_bin, "its sidecar says"), (break_sidecar, "meta.json is damaged")]
)
def test_other_damage_is_named(prefix: str, damage: Callable[[str], None], message: str) -> None:
    damage(prefix)
    with pytest.raises(DataError, match=message):
        verify_corpus(prefix)


def test_id_outside_of_the_vocabulary_is_named_with_its_place(tmp_path: Path) -> None:
    write_by_description(tmp_path / "c", [[[1, 2]], [[3, 4, 900]]])
    with pytest.raises(DataError, match="id of sequence 1, token 2, is 900, outside of the vocabulary of 900"):
        verify_corpus(str(tmp_path / "c"), vocab_size=900)
    write_by_description(tmp_path / "n", [[[1, 2]], [[3, -4]]], code=4)
    with pytest.raises(DataError, match="id of sequence 1, token 1, is -4"):
        verify_corpus(str(tmp_path / "n"))


def test_corpus_without_sidecar_is_said_not_to_be_proved(tmp_path: Path) -> None:
    write_by_description(tmp_path / "c", [[[1, 2]]])
    assert verify_corpus(str(tmp_path / "c")).hashed is False


def test_vocabulary_comes_from_the_sidecar(prefix: str) -> None:
    path = Path(f"{prefix}.meta.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": {"vocab_size": 300}}))
    with pytest.raises(DataError, match="outside of the vocabulary of 300"):
        verify_corpus(prefix)


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer": 5},
        {"tokenizer": {"vocab_size": "x"}},
        {"tokenizer": {"probe": "x"}},
        {"partition": 5},
        {"partition": {"index": "a", "count": 2, "corpus": ""}},
        {"sources": 5},
        {"skipped_lines": "x"},
    ],
)
def test_a_sidecar_with_parts_of_another_kind_is_damaged(
    prefix: str, fields: dict[str, object], tmp_path: Path
) -> None:
    sidecar = Path(f"{prefix}.meta.json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **fields}))
    for use in (verify_corpus, lambda prefix: merge_datasets([prefix], tmp_path / "merged")):
        with pytest.raises(DataError, match=f"meta.json is damaged: .*{next(iter(fields))}"):
            use(prefix)
    assert not list(tmp_path.glob("merged*"))

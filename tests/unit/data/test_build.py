from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megalm.config.data import DataConfig
from megalm.data.build import build_datasets
from megalm.data.gpt_dataset import GPTDataset
from megalm.data.indexed import IndexedDataset
from megalm.data.indexed_writer import IndexedWriter
from megalm.errors import DataError

NUM_SAMPLES = {"train": 120, "valid": 16, "test": 4}


def corpus(folder: Path, name: str, base: int = 0, documents: int = 200) -> str:
    draw = np.random.default_rng(base)
    with IndexedWriter(folder / name, "u2") as writer:
        for _ in range(documents):
            writer.add_document(base + draw.integers(0, 1000, draw.integers(1, 40)))
    return str(folder / name)


def test_samples_are_cut_from_one_stream_with_one_token_shared(tmp_path: Path) -> None:
    indexed = IndexedDataset(corpus(tmp_path, "a"))
    dataset = GPTDataset(indexed, (0, 200), seq_length=16, num_samples=300, seed=5)
    stream = np.concatenate([indexed.get(int(i)) for i in dataset.map.documents])
    for i in range(len(dataset)):
        at = int(dataset.map.shuffle[i]) * 16
        assert dataset[i].tolist() == stream[at : at + 17].tolist()
        assert dataset[i].dtype == np.int64


def test_every_token_of_an_epoch_is_predicted_once(tmp_path: Path) -> None:
    indexed = IndexedDataset(corpus(tmp_path, "a"))
    dataset = GPTDataset(indexed, (0, 200), seq_length=16, num_samples=1, seed=5)
    stream = np.concatenate([indexed.get(int(i)) for i in dataset.map.documents])
    predicted = np.sort(np.concatenate([dataset[i][1:] for i in range(len(dataset))]))
    assert predicted.tolist() == np.sort(stream[1 : 1 + 16 * len(dataset)]).tolist()


def test_splits_of_a_corpus_share_no_document(tmp_path: Path) -> None:
    data = DataConfig(data_path=(corpus(tmp_path, "a"),), seq_length=16, split="90,8,2")
    built = build_datasets(data, num_samples=NUM_SAMPLES, seed=1)
    ranges = [built.train.split_range, built.valid["valid"].split_range, built.test["test"].split_range]
    assert ranges == [(0, 180), (180, 196), (196, 200)]
    assert len(built.report) == 3


def test_blend_draws_from_each_corpus_by_weight(tmp_path: Path) -> None:
    words = ("1", corpus(tmp_path, "a"), "3", corpus(tmp_path, "b", base=20_000))
    built = build_datasets(DataConfig(data_path=words, seq_length=16), num_samples=NUM_SAMPLES, seed=1)
    from_a = sum(int(built.train[i].max()) < 20_000 for i in range(len(built.train)))
    assert (len(built.train), from_a) == (120, 30)


def test_several_named_validation_sets(tmp_path: Path) -> None:
    a, b = corpus(tmp_path, "a"), corpus(tmp_path, "b", base=20_000)
    data = DataConfig(
        train_weighted_split_paths=(f"T: 1 0:0.9 {a}, 1 0:0.9 {b}",),
        valid_weighted_split_paths=(f"A: 1 0.9:1 {a}", f"B: 1 0.9:1 {b}"),
        seq_length=16,
    )
    built = build_datasets(data, num_samples=NUM_SAMPLES, seed=1)
    assert list(built.valid) == ["A", "B"]
    assert built.test == {}
    assert all(int(built.valid["B"][i].min()) >= 20_000 for i in range(16))


def test_corpus_used_twice_in_a_group_is_reported(tmp_path: Path) -> None:
    a = corpus(tmp_path, "a")
    data = DataConfig(train_weighted_split_paths=(f"T: 1 0:0.5 {a}, 1 0.25:1 {a}",), seq_length=16)
    report = build_datasets(data, num_samples={"train": 10}, seed=1).report
    assert any("50 sequences" in line and "twice" in line for line in report)


def test_id_outside_of_the_vocabulary_is_named_with_its_place(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "c", "u2") as writer:
        writer.add_document([1, 2, 3, 900, 4, 5, 6, 7, 8])
    data = DataConfig(data_path=(str(tmp_path / "c"),), seq_length=8, split="1,0,0")
    built = build_datasets(data, num_samples={"train": 1}, seed=1, vocab_size=900)
    with pytest.raises(DataError, match=r"token id 900 in .*c, sequence 0, token 3, lies outside"):
        built.train[0]


def test_order_of_the_other_trainer_is_a_matter_of_configuration(tmp_path: Path) -> None:
    a = corpus(tmp_path, "a", documents=101)
    split = {
        order: build_datasets(
            DataConfig(data_path=(a,), seq_length=16, split="1,1,1", sample_order=order),
            num_samples=NUM_SAMPLES,
            seed=1,
        )
        for order in ("bigscience", "megatron-core")
    }
    # 101 / 3 = 33.67 rounds to 34 three times, one too many, by which BigScience shifts every bound.
    assert split["bigscience"].train.split_range == (0, 33)
    assert split["megatron-core"].train.split_range == (0, 34)


def test_verification_before_training_finds_a_flipped_bit(tmp_path: Path) -> None:
    a = corpus(tmp_path, "a")
    data = DataConfig(data_path=(a,), seq_length=16, verify_data=True)
    assert "equals its hashes" in build_datasets(data, num_samples={"train": 9}, seed=1).report[0]
    raw = bytearray(Path(f"{a}.bin").read_bytes())
    raw[100] ^= 1
    Path(f"{a}.bin").write_bytes(raw)
    with pytest.raises(DataError, match="does not have the sha256"):
        build_datasets(data, num_samples={"train": 9}, seed=1)
    build_datasets(data, num_samples={"train": 9}, seed=1, verifies=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no corpus is given"),
        ({"data_path": ("nowhere",)}, "no corpus at nowhere"),
        ({"data_path": ("A",), "split": "1,0,0"}, "the valid split of data_path is empty"),
        ({"data_path": ("A",), "valid_weighted_split_paths": ("V: 1 0:1 A",)}, "exclude each other"),
        ({"data_path": ("0", "A", "1", "A")}, "has weight 0.0; leave it out"),
        ({"train_weighted_split_paths": ("T: 1 0:1 A", "U: 1 0:1 A")}, "training takes one weighted group"),
        ({"valid_weighted_split_paths": ("V: 1 0:1 A",)}, "no training corpus is given"),
        ({"train_weighted_split_paths": ("T: 1 0:0.001 A",)}, "T split of .* none"),
    ],
)
def test_bad_data_section_is_refused(tmp_path: Path, fields: dict, message: str) -> None:
    a = corpus(tmp_path, "a")
    real = {
        name: tuple(a if word == "A" else word.replace(" A", f" {a}") for word in value)
        if isinstance(value, tuple)
        else value
        for name, value in fields.items()
    }
    with pytest.raises(DataError, match=message):
        build_datasets(DataConfig(seq_length=16, **real), num_samples=NUM_SAMPLES, seed=1)

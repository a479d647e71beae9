from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalm.config.data import DataConfig
from megalm.data.blend import normalised
from megalm.data.build import build_datasets
from megalm.data.gpt_dataset import GPTDataset
from megalm.data.indexed import IndexedDataset
from megalm.data.indexed_writer import IndexedWriter
from megalm.data.order import ORDERS
from megalm.errors import DataError
from tests.support.token_files import write_by_description
from tests.unit.data.test_blend import slow_order
from tests.unit.data.test_sample_map import slow_maps

NUM_SAMPLES = {"train": 120, "valid": 16, "test": 4}


def corpus(folder: Path, name: str, base: int = 0, documents: int = 200) -> str:
    draw = np.random.default_rng(base)
    with IndexedWriter(folder / name, "u2", overwrite=True) as writer:
        for _ in range(documents):
            writer.add_document(base + draw.integers(0, 1000, draw.integers(1, 40)))
    return str(folder / name)


def write_lengths(prefix: Path, lengths: list[int]) -> str:
    with IndexedWriter(prefix, "u2") as writer:
        for length in lengths:
            writer.add_document(np.arange(length) % 500)
    return str(prefix)


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
    assert [line.split(":")[0] for line in built.report] == ["train", "valid", "test"]


def test_blend_draws_from_each_corpus_by_weight(tmp_path: Path) -> None:
    words = ("1", corpus(tmp_path, "a"), "3", corpus(tmp_path, "b", base=20_000))
    built = build_datasets(DataConfig(data_path=words, seq_length=16), num_samples=NUM_SAMPLES, seed=1)
    from_a = sum(int(built.train[i].max()) < 20_000 for i in range(len(built.train)))
    assert (len(built.train), from_a) == (120, 30)


@given(
    weights=st.lists(st.floats(0.05, 5.0), min_size=2, max_size=4),
    num_samples=st.integers(1, 90),
    order=st.sampled_from(["bigscience", "megatron-core"]),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blend_equals_the_slow_version_sample_for_sample(
    tmp_path: Path, weights: list[float], num_samples: int, order: str
) -> None:
    """Dealt one by one by the largest deficit, each corpus cut from a stream for as many as its share."""
    names = [corpus(tmp_path, "abcd"[i], base=1000 * i, documents=20 + 30 * i) for i in range(len(weights))]
    words = tuple(word for weight, name in zip(weights, names, strict=True) for word in (repr(weight), name))
    data = DataConfig(data_path=words, seq_length=16, split="1,0,0", sample_order=order)
    built = build_datasets(data, num_samples={"train": num_samples}, seed=9).train
    shares = normalised(weights)
    dealt = slow_order(shares, num_samples)
    streams, maps = [], []
    for i, name in enumerate(names):
        indexed = IndexedDataset(name)
        asked = max(ORDERS[order].share(num_samples, shares[i]), dealt.count(i))
        documents, _, shuffled = slow_maps(
            indexed.lengths.tolist(),
            0,
            len(indexed),
            num_samples=asked,
            seq_length=16,
            seed=9,
            threshold=ORDERS[order].final_epoch_share,
        )
        streams.append(np.concatenate([indexed.get(document) for document in documents]))
        maps.append(iter(shuffled))
    for number, i in enumerate(dealt):
        at = next(maps[i]) * 16
        assert built[number].tolist() == streams[i][at : at + 17].tolist()


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
    warnings = build_datasets(data, num_samples={"train": 10}, seed=1).warnings
    assert any("50 sequences" in line and "twice" in line for line in warnings)


def test_corpus_under_two_names_is_known_for_one(tmp_path: Path) -> None:
    a = corpus(tmp_path, "a")
    for suffix in (".bin", ".idx"):
        (tmp_path / f"link{suffix}").symlink_to(f"{a}{suffix}")
    data = DataConfig(data_path=("1", a, "1", str(tmp_path / "link")), split="1,0,0", seq_length=16)
    assert "200 sequences of" in build_datasets(data, num_samples={"train": 10}, seed=1).warnings[0]


def test_sequences_that_are_trained_on_and_evaluated_on_are_reported(tmp_path: Path) -> None:
    a = corpus(tmp_path, "a")
    data = DataConfig(
        train_weighted_split_paths=(f"T: 1 0:0.95 {a}",),
        valid_weighted_split_paths=(f"V: 1 0.9:1 {a}", f"W: 1 0.95:1 {a}"),
        seq_length=16,
    )
    warnings = build_datasets(data, num_samples={"train": 10, "valid": 2}, seed=1).warnings
    assert len(warnings) == 1
    assert re.match(r"V: 10 sequences of .* are in T too", warnings[0])


def test_report_counts_samples_epochs_and_repetitions(tmp_path: Path) -> None:
    a, b = (write_lengths(tmp_path / name, [1000] * n) for name, n in (("a", 1), ("b", 8)))
    data = DataConfig(data_path=("1", a, "1", b), split="1,0,0", seq_length=100)
    built = build_datasets(data, num_samples={"train": 80}, seed=1)
    assert built.report[0] == "train: 80 samples of 100 tokens from 2 corpora"
    # (1,000 - 1) // 100 = 9 samples of a; 40 are asked, that is 4,000 of 1,000 tokens and 31 samples again.
    assert built.report[2].split() == ["0.5", "40", "9", "4", "31", f"{a},", "1,000", "tokens"]
    assert built.report[3].split() == ["0.5", "40", "79", "0.5", "0", f"{b},", "8,000", "tokens"]
    assert built.warnings == []


def test_single_corpus_is_reported_in_a_line(tmp_path: Path) -> None:
    a = write_lengths(tmp_path / "a", [1000])
    data = DataConfig(data_path=(a,), split="1,0,0", seq_length=100)
    (line,) = build_datasets(data, num_samples={"train": 30}, seed=1).report
    assert line == (
        f"train: 30 samples of 100 tokens from {a}, 1,000 tokens, 9 in an epoch: 3 epochs, 21 samples are seen again"
    )


def test_evaluation_that_reads_samples_again_is_a_warning(tmp_path: Path) -> None:
    a = write_lengths(tmp_path / "a", [1000] * 10)
    data = DataConfig(data_path=(a,), split="90,10,0", seq_length=100)
    (warning,) = build_datasets(data, num_samples={"train": 30, "valid": 12}, seed=1).warnings
    assert "valid: too small" in warning
    assert "(12 asked, 9 there)" in warning


def test_corpus_that_gives_no_sample_is_a_warning(tmp_path: Path) -> None:
    a, b, c = (write_lengths(tmp_path / name, [1000] * 5) for name in "abc")
    data = DataConfig(data_path=("1", a, "0.0002", b, "0.0001", c), split="1,0,0", seq_length=100)
    (warning,) = build_datasets(data, num_samples={"train": 30}, seed=1).warnings
    assert f"train: 30 samples are too few to draw one of {c} (weight 0.0001)" in warning


def test_report_of_many_corpora_is_short(tmp_path: Path) -> None:
    names = [write_lengths(tmp_path / f"c{i:02}", [10 * (i + 1)]) for i in range(40)]
    data = DataConfig(data_path=tuple(word for name in names for word in ("1", name)), split="1,0,0", seq_length=10)
    said: list[str] = []
    built = build_datasets(data, num_samples={"train": 400}, seed=1, log=said.append)
    assert len(built.report) == 3 + 5
    # Ten samples each; the corpus of 10 * k tokens holds k - 1, so that k up to 10 repeat: 10 + 9 + ... + 1.
    assert "30 corpora are read once or less, 10 more than once (55 samples are seen again)" in built.report[1]
    assert "c00" in built.report[3]
    assert len(built.warnings) == 0


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


def test_index_is_held_against_its_hash_on_opening(tmp_path: Path) -> None:
    """A document bound that moved, and a dtype of the same size, leave every size and pointer consistent."""
    a = corpus(tmp_path, "a")
    data = DataConfig(data_path=(a,), seq_length=16, split="1,0,0")
    raw = bytearray(Path(f"{a}.idx").read_bytes())
    for at, value in ((len(raw) - 16, raw[len(raw) - 16] ^ 1), (17, 3)):
        changed = bytearray(raw)
        changed[at] = value
        Path(f"{a}.idx").write_bytes(changed)
        IndexedDataset(a)
        with pytest.raises(DataError, match="a.idx does not have the sha256"):
            build_datasets(data, num_samples={"train": 9}, seed=1)


def test_verification_says_that_hashes_are_absent(tmp_path: Path) -> None:
    a = corpus(tmp_path, "a")
    Path(f"{a}.meta.json").unlink()
    built = build_datasets(
        DataConfig(data_path=(a,), seq_length=16, split="1,0,0", verify_data=True), num_samples={"train": 9}, seed=1
    )
    assert "no a.meta.json is beside it" in built.warnings[0]
    assert not any("verified" in line for line in built.report)


def test_negative_id_is_refused_when_it_is_read(tmp_path: Path) -> None:
    write_by_description(tmp_path / "n", [[[1, 2, -3, 4, 5, 6, 7, 8, 9]]], code=4)
    data = DataConfig(data_path=(str(tmp_path / "n"),), seq_length=8, split="1,0,0")
    built = build_datasets(data, num_samples={"train": 1}, seed=1)
    with pytest.raises(DataError, match=r"token id -3 in .*n, sequence 0, token 2, lies outside of the vocabulary"):
        built.train[0]


def test_corpora_without_a_document_are_said_to_be_empty(tmp_path: Path) -> None:
    data = DataConfig(data_path=(corpus(tmp_path, "none", documents=0),), seq_length=8)
    with pytest.raises(DataError, match="data_path names no document: .*none is empty"):
        build_datasets(data, num_samples=NUM_SAMPLES, seed=1)


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

"""C: corpora, cached maps and names that are broken, and mutated indexes by the thousand."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest

from megalm.config.data import DataConfig
from megalm.config.parse import parse_command_line
from megalm.data.build import build_datasets
from megalm.data.gpt_dataset import GPTDataset
from megalm.data.indexed import IndexedDataset
from megalm.data.indexed_writer import IndexedWriter
from megalm.data.sidecar import check_index_hash
from megalm.errors import ConfigError, DataError
from tests.faults.report import Figures
from tests.support.damaged_corpora import (
    BAD_GROUPS,
    BAD_NAMES,
    CACHE_FAULTS,
    DOCUMENTS,
    GOOD_NAMES,
    INDEX_FAULTS,
    write_named,
)
from tests.support.tiny_run import MODEL_FLAGS, TRAINING_FLAGS
from tests.support.token_files import write_by_description

SECONDS_TO_ANSWER = 5.0
SAMPLES = {"train": 3}
# Ids that are negative as i2: a header that says i2 in place of u2 changes nothing else.
LARGE = [[[40_000, 2, 3], [4]], [[50_000, 6]], [[7, 65_000, 9, 10]]]


def datasets(prefix: str, **fields: object) -> list[str]:
    """Open a corpus as a run does and read every sample; returns the warnings."""
    data = DataConfig(seq_length=3, split="1,0,0", **({"data_path": (prefix,)} | fields))  # type: ignore[arg-type]
    built = build_datasets(data, num_samples=SAMPLES, seed=1, vocab_size=65_536)
    for i in range(len(built.train)):
        built.train[i]
    return built.warnings


def refused(prefix: str, message: str, **fields: object) -> None:
    """The answer is a DataError with these words, and soon."""
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        datasets(prefix, **fields)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert time.monotonic() - started < SECONDS_TO_ANSWER


def test_broken_indexes_and_tokens(tmp_path: Path, figures: Figures) -> None:
    with figures.count("C", "broken .idx and .bin files, each with its own error") as count:
        for name, (damage, message) in INDEX_FAULTS.items():
            with count.case(name):
                prefix = tmp_path / name.replace(" ", "_")
                write_by_description(prefix, DOCUMENTS)
                damage(prefix)
                refused(str(prefix), message)
    assert count.total >= 18


def test_broken_caches(tmp_path: Path, figures: Figures) -> None:
    with figures.count("C", "damaged sample maps, each named and built again") as count:
        for name, (damage, message) in CACHE_FAULTS.items():
            with count.case(name):
                prefix = write_named(tmp_path / name.replace(" ", "_"), "c")
                datasets(str(prefix))
                (entry,) = (path for path in (prefix.parent / "sample_maps").iterdir() if path.is_dir())
                damage(entry)
                (warning,) = datasets(str(prefix))
                assert re.search(message, warning), warning
                assert datasets(str(prefix)) == []
    assert count.total >= 6


def test_hostile_names(tmp_path: Path, figures: Figures) -> None:
    with figures.count(
        "C", "names: refused with their reason, or files like others, and nothing written elsewhere"
    ) as count:
        for number, (name, (make, message)) in enumerate(BAD_NAMES.items()):
            with count.case(name):
                folder = tmp_path / f"bad{number}"
                folder.mkdir()
                refused(make(folder), message)
                assert not list(folder.rglob("sample_maps"))
        for number, name in enumerate(GOOD_NAMES):
            with count.case(f"good name {name!r}"):
                folder = tmp_path / f"good{number}"
                datasets(str(write_named(folder, name)), cache_path=str(folder / "cache"))
                written = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
                assert written <= {"inside", "cache", "above"}
        for number, (name, (group, message)) in enumerate(BAD_GROUPS.items()):
            with count.case(f"group {name}"):
                folder = tmp_path / f"group{number}"
                prefix = write_named(folder, "c")
                refused("", message, data_path=(), train_weighted_split_paths=(group.format(prefix=prefix),))
                assert not list(folder.rglob("sample_maps"))
        (tmp_path / "a folder").mkdir()
        (tmp_path / "latin-1").write_bytes('"é: 1 0:1 a"'.encode("latin-1"))
        for name in ("missing", "a folder", "latin-1"):
            path = str(tmp_path / name)
            with count.case(f"groups file {name}"), pytest.raises(ConfigError, match=re.escape(path)):
                parse_command_line([*MODEL_FLAGS, *TRAINING_FLAGS, "--train-weighted-split-paths-path", path])
    assert count.total >= 10


def mutated(good: bytes, draw: random.Random) -> bytes:
    """One to four flipped bits, half of the time in the header; or a cut, a run written over, another dtype."""
    raw = bytearray(good)
    span = 34 if draw.random() < 0.5 else len(raw)
    for _ in range(draw.randint(1, 4)):
        raw[draw.randrange(span)] ^= 1 << draw.randrange(8)
    kind = draw.random()
    if kind < 0.1:
        raw = raw[: draw.randrange(len(raw))]
    elif kind < 0.2:
        at = draw.randrange(len(raw) - 8)
        raw[at : at + 8] = draw.randbytes(8)
    elif kind < 0.3:
        raw = bytearray(good)
        raw[17] = draw.randrange(10)  # the dtype, all else whole
    return bytes(raw)


def answer(prefix: Path, sequences: list[list[int]], maps: Path) -> str:
    """What reading an index without a checksum comes to: refused, or the right tokens, or AssertionError."""
    try:
        indexed = IndexedDataset(prefix)
    except DataError:
        return "refused"
    found = [indexed.get(i).tolist() for i in range(len(indexed))]
    if found == sequences:
        return "right"
    # The one thing that sizes and pointers cannot tell: u2 read as i2. Ids from 32,768 on are then below 0.
    dataset = GPTDataset(indexed, (0, len(indexed)), seq_length=3, num_samples=3, seed=1, cache_path=str(maps))
    for i in range(len(dataset)):
        try:
            sample = dataset[i]
        except DataError:
            continue
        assert set(sample.tolist()) <= set(sum(sequences, [])), "wrong tokens in silence"
    return "refused when read"


def test_mutated_indexes_give_an_error_or_the_right_tokens(tmp_path: Path, figures: Figures, full: bool) -> None:
    """Document bounds may move in silence where there is no checksum, tokens never; with one nothing passes."""
    prefix = tmp_path / "corpus"
    with IndexedWriter(prefix, "u2") as writer:
        for document in LARGE:
            writer.add_sentences(document)
    index = Path(f"{prefix}.idx")
    good = index.read_bytes()
    write_by_description(tmp_path / "described", LARGE)
    assert good == (tmp_path / "described.idx").read_bytes()
    sequences = [sequence for document in LARGE for sequence in document]
    draw = random.Random(0)
    answers: dict[str, int] = {}
    with figures.count(
        "C", "mutated .idx files: an error or the right tokens; refused by the sidecar's sha256"
    ) as count:
        for number in range(100_000 if full else 2_000):
            with count.case(f"mutation {number}"):
                raw = mutated(good, draw)
                index.write_bytes(raw)
                said = answer(prefix, sequences, tmp_path / "maps")
                answers[said] = answers.get(said, 0) + 1
                if raw != good:
                    with pytest.raises(DataError, match="corpus.idx"):
                        check_index_hash(str(prefix))
    assert answers["refused"] > 0.9 * count.total, answers
    assert answers["refused when read"] > 0, answers
    print(answers)

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.documents import blocks
from megalm.data.encoding import Recipe
from megalm.data.inputs import Position, find_sources
from megalm.data.merge import merge_datasets, partition_order
from megalm.data.partition import Partition, span
from megalm.data.preprocess import Job, Progress, preprocess
from megalm.errors import DataError

RECIPE = Recipe(encode=lambda text: list(text.encode()), vocab_size=257, dtype=np.dtype("u2"), eod_id=256)


def make_inputs(folder: Path) -> list[str]:
    """A file of each kind, lines of many lengths, an empty file."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abc äé\n", k=draw.choice([0, 9, 60, 400]))) for _ in range(160)]
    lines = [(json.dumps({"text": text}) + "\n").encode() for text in texts]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jsonl").write_bytes(b"".join(lines[:40]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[40:80])))
    (folder / "c.txt").write_text("".join(text.replace("\n", " ") + "\n" for text in texts[80:100]) + "no line feed")
    (folder / "d.jsonl").write_bytes(b"")
    table = pyarrow.table({"text": texts[100:]})
    pyarrow.parquet.write_table(table, folder / "e.parquet", row_group_size=25)
    return [str(path) for path in sorted(folder.iterdir())]


def job(inputs: list[str], output: Path, **change: object) -> Job:
    fields: dict = {"workers": 0, "about": {"tokenizer": {"digest": "d"}}, **change}
    return Job(find_sources(inputs), str(output), RECIPE, **fields)


def run_parts(inputs: list[str], output: Path, count: int, **change: object) -> list[str]:
    for index in range(count):
        preprocess(job(inputs, Path(f"{output}_{index}"), partition=Partition(index, count), **change))
    return [f"{output}_{index}_text_document" for index in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_merged_parts_are_the_corpus_of_one_machine(tmp_path: Path, count: int) -> None:
    inputs = make_inputs(tmp_path / "in")
    whole = preprocess(job(inputs, tmp_path / "whole"))
    parts = run_parts(inputs, tmp_path / "part", count)
    merge_datasets(parts, tmp_path / "merged")
    for suffix in (".bin", ".idx"):
        merged = Path(f"{tmp_path}/merged{suffix}").read_bytes()
        assert merged == Path(f"{tmp_path}/whole_text_document{suffix}").read_bytes()
    sidecar = json.loads((tmp_path / "merged.meta.json").read_text())
    assert sidecar["empty_documents"] == whole.empty
    assert sidecar["tokenizer"] == {"digest": "d"}
    assert {source["path"] for source in sidecar["sources"]} >= {path for path in inputs if "d.jsonl" not in path}


@given(st.lists(st.binary(max_size=120), min_size=1, max_size=4), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_parts_of_any_lines_cover_each_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], count: int
) -> None:
    folder = tmp_path_factory.mktemp("p")
    for number, content in enumerate(contents):
        (folder / f"{number}.txt").write_bytes(content)
    sources = find_sources([str(folder)])
    found, last = b"", Position()
    for index in range(count):
        start, stop = span(sources, Partition(index, count))
        assert start == last
        for block in blocks(sources, start=start, stop=stop, block_bytes=7):
            content = block.read()
            assert content.endswith(b"\n") or block.offset + block.size == sources[block.source].size_bytes
            found += content
        last = stop
    assert last == Position(len(sources))
    assert found == b"".join(contents)


def test_parts_share_the_work(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "0123456789"}\n' * 1000)
    sizes = []
    for index in range(8):
        start, stop = span(find_sources([str(tmp_path / "a.jsonl")]), Partition(index, 8))
        sizes.append((stop.offset or 23_000) - start.offset)
    assert sum(sizes) == 23_000
    assert max(sizes) - min(sizes) <= 2 * 23


def test_bad_line_of_a_part_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    lines = [b'{"text": "ab"}\n'] * 50
    lines[33] = b"broken\n"
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=r"a.jsonl, line 34, byte 495: not JSON"):
        run_parts([str(tmp_path / "a.jsonl")], tmp_path / "part", 4)


def test_line_that_is_too_long_is_named_in_every_part(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok\n" * 10 + b"x" * 5000 + b"\nok\n")
    for index in (0, 1, 3):
        with pytest.raises(DataError, match=r"a.txt, line 11, byte 30: the line is longer than 1000 bytes"):
            preprocess(
                job([str(tmp_path / "a.txt")], tmp_path / "x", max_line_bytes=1000, partition=Partition(index, 4))
            )


def test_killed_part_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "in")
    plain = run_parts(inputs, tmp_path / "plain", 3)

    def die(progress: Progress) -> None:
        if progress.documents > 10:
            raise KeyboardInterrupt

    for index in range(3):
        part = job(inputs, tmp_path / f"killed_{index}", partition=Partition(index, 3), block_bytes=50)
        part = replace(part, resume=True, journal_seconds=0.0)
        with pytest.raises(KeyboardInterrupt):
            preprocess(part, report=die)
        with pytest.raises(DataError, match="cannot resume: partition changed"):
            preprocess(replace(part, partition=Partition(index, 4)))
        preprocess(part)
        for suffix in (".bin", ".idx"):
            found = Path(f"{tmp_path}/killed_{index}_text_document{suffix}").read_bytes()
            assert found == Path(plain[index] + suffix).read_bytes()


def test_merge_refuses_parts_that_do_not_make_the_corpus(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "in")
    parts = run_parts(inputs, tmp_path / "part", 3)
    other = run_parts(inputs[:1], tmp_path / "other", 3)
    twice = run_parts(inputs, tmp_path / "four", 4)
    preprocess(job(inputs, tmp_path / "whole"))
    preprocess(job(inputs, tmp_path / "foreign", about={"tokenizer": {"digest": "e"}}))
    for given_parts, message in (
        (parts[:2], "part 2 of 3 is missing"),
        (parts[1:2], "part 0, 2 of 3 is missing"),
        ([parts[1], parts[0], parts[2]], "the parts come in the order 1, 0, 2"),
        ([*parts, parts[2]], "the parts come in the order 0, 1, 2, 2"),
        ([*parts[:2], other[2]], "parts of different corpora"),
        ([*parts[:2], twice[2]], "parts of different corpora"),
        ([*parts, str(tmp_path / "whole_text_document")], "whole_text_document is none"),
        ([str(tmp_path / "whole_text_document"), str(tmp_path / "foreign_text_document")], "different tokenizers"),
    ):
        with pytest.raises(DataError, match=message):
            merge_datasets(given_parts, tmp_path / "merged")
    assert partition_order([parts[2], parts[0], parts[1]]) == parts
    with Path(f"{parts[1]}.bin").open("r+b") as file:
        file.write(b"\x07")
    with pytest.raises(DataError, match="does not have the sha256"):
        merge_datasets(parts, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


def test_partition_that_does_not_exist_is_refused() -> None:
    for index, count in ((4, 4), (-1, 4), (0, 0)):
        with pytest.raises(DataError, match="does not exist"):
            Partition(index, count)

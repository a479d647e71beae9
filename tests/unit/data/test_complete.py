"""--resume of an output that is whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megalm.data.complete import is_complete
from megalm.data.inputs import find_sources
from megalm.data.partition import Partition
from megalm.data.preprocess import Job, preprocess
from megalm.errors import DataError
from tests.unit.data.test_preprocess import recipe, write_lines

ABOUT = {"tokenizer": {"digest": "d", "vocab_size": 257, "probe": [1, 2]}, "append_eod": True}
FLAGS = {"json_keys": ["text"], "max_line_bytes": 1 << 30}


def job_of(folder: Path, **change: object) -> Job:
    sources = find_sources([str(folder / "a.jsonl"), str(folder / "b.jsonl")])
    fields: dict = {"workers": 0, "about": ABOUT, "flags": FLAGS, "resume": True, **change}
    return Job(sources, str(folder / "out"), fields.pop("recipe", recipe()), **fields)


@pytest.fixture
def done(tmp_path: Path) -> Path:
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [name * number for number in range(1, 40)])
    assert not is_complete(job_of(tmp_path))
    preprocess(job_of(tmp_path))
    return tmp_path


def test_the_same_sources_and_settings_are_complete_wherever_they_lie(done: Path) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in done.iterdir())
    assert is_complete(job_of(done))
    assert is_complete(job_of(done, workers=2, block_bytes=100))
    assert sorted((path.name, path.stat().st_mtime_ns) for path in done.iterdir()) == before
    (done / "moved").mkdir()
    for path in done.glob("[abo]*.*"):
        path.rename(done / "moved" / path.name)
    assert is_complete(job_of(done / "moved"))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"about": {**ABOUT, "append_eod": False}}, "append_eod"),
        ({"about": {**ABOUT, "tokenizer": {"digest": "e"}}}, "tokenizer"),
        ({"about": {**ABOUT, "sentences": {"splitter": "rules"}}}, "sentences"),
        ({"flags": {**FLAGS, "json_keys": ["text", "title"]}}, "json_keys"),
        ({"flags": {**FLAGS, "max_line_bytes": 9}}, "max_line_bytes"),
        ({"recipe": recipe(dtype=np.dtype("i4"))}, "width of ids"),
        ({"partition": Partition(0, 2)}, "partition"),
    ],
)
def test_other_settings_are_refused_by_name(done: Path, change: dict[str, object], named: str) -> None:
    with pytest.raises(
        DataError, match=rf"out_text_document is whole, and was made with other {named}\n  choose another"
    ):
        is_complete(job_of(done, **change))


def _same_size(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"aaa", b"bbb", 1))


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"text": "more"}\n')


@pytest.mark.parametrize("change", [_same_size, _longer])
def test_other_sources_are_refused(done: Path, change: Callable[[Path], None]) -> None:
    change(done / "a.jsonl")
    with pytest.raises(DataError, match="made with other sources"):
        is_complete(job_of(done))


def test_sources_in_another_order_are_others(done: Path) -> None:
    job = job_of(done)
    with pytest.raises(DataError, match="made with other sources"):
        is_complete(replace(job, sources=job.sources[::-1]))


@pytest.mark.parametrize("end", ["bin", "idx"])
def test_a_corpus_that_has_changed_is_not_complete(done: Path, end: str) -> None:
    path = done / f"out_text_document.{end}"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="does not have the sha256"):
        is_complete(job_of(done))


def test_what_nothing_is_known_about_is_left_to_the_run_to_refuse(done: Path) -> None:
    assert not is_complete(job_of(done, overwrite=True))
    (done / "out_text_document.meta.json").unlink()
    job = job_of(done)
    assert not is_complete(job)
    with pytest.raises(DataError, match="exists already"):
        preprocess(job)


def test_skipped_lines_are_a_setting(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "b.jsonl").write_text("broken\n")
    preprocess(job_of(tmp_path, skip_bad_lines=True))
    assert is_complete(job_of(tmp_path, skip_bad_lines=True))
    with pytest.raises(DataError, match="made with other on_bad_line"):
        is_complete(job_of(tmp_path))


def test_a_part_of_a_corpus_is_complete(tmp_path: Path) -> None:
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [name * number for number in range(1, 40)])
    job = job_of(tmp_path, partition=Partition(1, 3))
    preprocess(job)
    assert "from_byte" in json.loads((tmp_path / "out_text_document.meta.json").read_text())["sources"][0]
    assert is_complete(job)
    with pytest.raises(DataError, match="made with other sources"):
        is_complete(job_of(tmp_path, partition=Partition(2, 3)))

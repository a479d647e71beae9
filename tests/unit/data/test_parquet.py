from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megalm.data.documents import blocks
from megalm.data.encoding import Recipe
from megalm.data.inputs import Position, find_sources
from megalm.data.preprocess import Job, Progress, preprocess
from megalm.errors import DataError
from tests.support.token_files import read_by_description

RECIPE = Recipe(encode=lambda text: list(text.encode()), vocab_size=257, dtype=np.dtype("u2"), eod_id=256)


def run(source: Path, output: Path, *, report: Callable[[Progress], None] | None = None, **change: object) -> Progress:
    fields: dict[str, Any] = {"workers": 0, "recipe": RECIPE, **change}
    return preprocess(Job(find_sources([str(source)]), str(output), **fields), report=report)


def corpus_bytes(output: Path, key: str = "text") -> tuple[bytes, bytes]:
    return Path(f"{output}_{key}_document.bin").read_bytes(), Path(f"{output}_{key}_document.idx").read_bytes()


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.fixture
def texts() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices("abc äé\n", k=draw.randrange(60))) for _ in range(300)]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_rows_give_the_corpus_of_the_same_lines(tmp_path: Path, texts: list[str], kind: str) -> None:
    types = {
        "large_string": pyarrow.large_string(),
        "string_view": pyarrow.string_view(),
        "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    }
    column = pyarrow.array(texts).cast(types.get(kind, pyarrow.string()))
    source = write(tmp_path / "a.parquet", {"id": list(range(300)), "text": column}, row_group_size=70)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run(tmp_path / "b.jsonl", tmp_path / "lines")
    done = run(source, tmp_path / "rows")
    assert corpus_bytes(tmp_path / "rows") == corpus_bytes(tmp_path / "lines")
    assert (done.documents, done.empty, done.done_bytes) == (300, texts.count(""), source.stat().st_size)


@pytest.mark.parametrize(("workers", "block_bytes"), [(0, 1), (1, 300), (3, 300), (2, 1 << 20)])
def test_bytes_do_not_depend_on_workers_or_blocks(
    tmp_path: Path, texts: list[str], workers: int, block_bytes: int
) -> None:
    source = write(tmp_path / "a.parquet", {"text": texts[:120]}, row_group_size=50)
    run(source, tmp_path / "plain")
    run(source, tmp_path / "out", workers=workers, block_bytes=block_bytes)
    assert corpus_bytes(tmp_path / "out") == corpus_bytes(tmp_path / "plain")


def test_blocks_cover_every_row_once_from_any_start(tmp_path: Path, texts: list[str]) -> None:
    sources = find_sources([str(write(tmp_path / "a.parquet", {"text": texts}, row_group_size=90))])
    for first, last in ((0, 300), (0, 1), (89, 91), (90, 180), (299, 300), (13, 13)):
        found = blocks(sources, start=Position(0, first), stop=Position(0, last), block_bytes=100)
        rows = [text for block in found for (text,) in block.documents(["text"])]
        assert rows == texts[first:last]


def test_killed_run_resumes_to_the_same_bytes(tmp_path: Path, texts: list[str]) -> None:
    source = write(tmp_path / "a.parquet", {"text": texts}, row_group_size=80)
    run(source, tmp_path / "plain")
    for stop in (20, 100, 101, 250):

        def die(progress: Progress, stop: int = stop) -> None:
            if progress.documents >= stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", report=die, block_bytes=200, journal_seconds=0.0, resume=True)
    run(source, tmp_path / "out", resume=True)
    assert corpus_bytes(tmp_path / "out") == corpus_bytes(tmp_path / "plain")


def test_several_columns_make_a_corpus_each(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet", {"title": ["T", ""], "n": [1, 2], "text": ["ab", "c"]})
    run(source, tmp_path / "out", recipe=Recipe(**{**RECIPE.__dict__, "keys": ("text", "title")}))
    assert read_by_description(tmp_path / "out_text_document") == [[[97, 98, 256]], [[99, 256]]]
    assert read_by_description(tmp_path / "out_title_document") == [[[84, 256]]]


BAD_COLUMNS: dict[str, tuple[Callable[[], Any], str]] = {
    "null": (lambda: pyarrow.array(["a", "b", None, "d"]), "row group 1, row 0: column 'text' holds null"),
    "number": (lambda: pyarrow.array([1, 2, 3, 4]), "row group 0, row 0: column 'text' holds int64, not a string"),
    "bytes": (lambda: pyarrow.array([b"a"] * 4), "row group 0, row 0: column 'text' holds binary, not a string"),
    "list": (lambda: pyarrow.array([["a"]] * 4), "row group 0, row 0: column 'text' holds list<"),
    "not utf-8": (
        lambda: pyarrow.array([b"a", b"b", b"c", b"caf\xe9"]).view(pyarrow.string()),
        "row group 1, row 1: column 'text' holds bytes that are not UTF-8, the first of them 0xe9",
    ),
    "too long": (
        lambda: pyarrow.array(["a", "b" * 101, "c", "d"]),
        "row 1: column 'text' holds a text longer than 100",
    ),
}


@pytest.mark.parametrize("kind", BAD_COLUMNS)
def test_each_kind_of_bad_row_is_named_with_its_place(tmp_path: Path, kind: str) -> None:
    column, message = BAD_COLUMNS[kind]
    source = write(tmp_path / "a.parquet", {"text": column()}, row_group_size=2)
    with pytest.raises(DataError) as failure:
        run(source, tmp_path / "out", max_line_bytes=100, workers=1)
    assert f"{source}, " in str(failure.value)
    assert message in str(failure.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet", {"body": ["a"], "id": [1]})
    with pytest.raises(DataError, match="row group 0, row 0: no column 'text'; its columns are body, id"):
        run(source, tmp_path / "out")


def test_skipped_rows_are_counted_and_listed(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet", {"text": ["a", None, "c", None, "e"]}, row_group_size=2)
    done = run(source, tmp_path / "out", skip_bad_lines=True, block_bytes=1)
    assert read_by_description(tmp_path / "out_text_document") == [[[97, 256]], [[99, 256]], [[101, 256]]]
    listed = [json.loads(line) for line in (tmp_path / "out.bad_lines.jsonl").read_text().splitlines()]
    assert [(entry["row_group"], entry["row"]) for entry in listed] == [(0, 1), (1, 1)]
    assert done.skipped == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-4],
        lambda raw: b"",
        lambda raw: b"PAR1",
        lambda raw: b'{"text": "a"}\n' * 20,
        lambda raw: raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:],
        lambda raw: raw[:-8] + b"\xff\xff\xff\x7fPAR1",
        lambda raw: raw + b"trailing rubbish",
    ],
    ids=["cut", "no end", "empty", "start only", "other file", "flipped bit", "footer", "rubbish at the end"],
)
def test_each_damage_of_a_file_is_named(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    draw = random.Random(1)
    rows = ["".join(draw.choices("abcdefghij", k=500)) for _ in range(60)]
    source = write(tmp_path / "a.parquet", {"text": rows}, write_page_checksum=True, use_dictionary=False)
    source.write_bytes(change(source.read_bytes()))
    with pytest.raises(DataError, match=r"a\.parquet.*: damaged, or no parquet file: "):
        run(source, tmp_path / "out", skip_bad_lines=True, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary", "binary", "not utf-8"])
def test_long_texts_give_the_same_bytes_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], kind: str
) -> None:
    types = {
        "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        "large_string": pyarrow.large_string(),
        "string_view": pyarrow.string_view(),
        "binary": pyarrow.binary(),
    }
    column = pyarrow.array([text * 9 + " a b" for text in texts]).cast(types.get(kind, pyarrow.string()))
    if kind == "not utf-8":
        column = pyarrow.array([b"caf\xe9 au lait" * 30] * 300).view(pyarrow.string())
    source = write(tmp_path / "a.parquet", {"text": column}, row_group_size=100)
    run(source, tmp_path / "plain", skip_bad_lines=True)
    for module, name, value in (
        ("parquet", "LONG_LINE_BYTES", 50),
        ("parquet", "LONG_STRING_BYTES", 100),
        ("long_line", "PIECE", 7),
    ):
        monkeypatch.setattr(f"megalm.data.{module}.{name}", value)
    splittable = Recipe(**{**RECIPE.__dict__, "splittable": True})
    done = run(source, tmp_path / "out", recipe=splittable, skip_bad_lines=True)
    assert corpus_bytes(tmp_path / "out") == corpus_bytes(tmp_path / "plain")
    assert done.skipped == (300 if kind in ("binary", "not utf-8") else 0)


def test_without_pyarrow_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.parquet", {"text": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"a\.parquet needs the pyarrow package\n  pip install pyarrow"):
        run(source, tmp_path / "out")

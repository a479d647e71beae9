from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.documents import blocks
from megalm.data.encoding import Recipe
from megalm.data.inputs import find_sources
from megalm.data.preprocess import Job, Progress, preprocess
from megalm.errors import DataError
from tests.support.damaged_input import ARCHIVE_DAMAGES
from tests.support.token_files import read_by_description

EOD = 256


def recipe(**change: object) -> Recipe:
    fields: dict = {
        "encode": lambda text: list(text.encode()),
        "vocab_size": 257,
        "dtype": np.dtype("u2"),
        "eod_id": EOD,
    }
    return Recipe(**{**fields, **change})


def run(
    inputs: list[Path], output: Path, *, report: Callable[[Progress], None] | None = None, **change: object
) -> Progress:
    fields: dict = {"workers": 0, "recipe": recipe(), **change}
    return preprocess(Job(find_sources([str(path) for path in inputs]), str(output), **fields), report=report)


def corpus_bytes(output: Path) -> tuple[bytes, bytes]:
    return Path(f"{output}_text_document.bin").read_bytes(), Path(f"{output}_text_document.idx").read_bytes()


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def texts() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices("abc äé\n", k=draw.randrange(60))) for _ in range(300)]


def test_a_journal_is_of_the_files_as_they_were_at_the_start(tmp_path: Path, texts: list[str]) -> None:
    """There may be 100,000 of them, and a journal every five seconds; one that changes is not gone on with."""
    sources = [write_lines(tmp_path / f"{name}.jsonl", texts[:50]) for name in "ab"]
    blocks_done = []

    def change_and_stop(progress: Progress) -> None:
        blocks_done.append(progress)
        if len(blocks_done) == 3:
            os.utime(sources[0], (1, 1))
        if len(blocks_done) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(sources, tmp_path / "out", report=change_and_stop, block_bytes=100, journal_seconds=0.0)
    with pytest.raises(DataError, match="cannot resume: sources changed"):
        run(sources, tmp_path / "out", resume=True)


def test_corpus_holds_every_document_with_its_end(tmp_path: Path, texts: list[str]) -> None:
    done = run([write_lines(tmp_path / "a.jsonl", texts)], tmp_path / "out")
    assert read_by_description(tmp_path / "out_text_document") == [[[*text.encode(), EOD]] for text in texts if text]
    assert (done.documents, done.empty) == (300, texts.count(""))


@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_bytes_do_not_depend_on_workers_or_blocks(
    tmp_path: Path, texts: list[str], workers: int, block_bytes: int
) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts[:80])
    run([source], tmp_path / "plain")
    run([source], tmp_path / "out", workers=workers, block_bytes=block_bytes)
    assert corpus_bytes(tmp_path / "out") == corpus_bytes(tmp_path / "plain")


@given(st.binary(max_size=400), st.integers(1, 50))
@settings(max_examples=80, deadline=None)
def test_blocks_cut_any_bytes_at_line_feeds_only(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, block_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("b") / "a.txt"
    path.write_bytes(content)
    found = list(blocks(find_sources([str(path)]), block_bytes=block_bytes))
    parts = [block.read() for block in found]
    assert b"".join(parts) == content
    assert all(part.endswith(b"\n") for part in parts[:-1])
    assert [block.offset for block in found] == [sum(map(len, parts[:i])) for i in range(len(parts))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_line_numbers_of_bad_lines_do_not_depend_on_blocks_or_restarts(tmp_path: Path, name: str) -> None:
    lines = [b'{"text": "ab"}\n' if i % 3 else b"broken\n" for i in range(30)]
    content = b"".join(lines)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    places = [(i + 1, len(b"".join(lines[:i]))) for i in range(0, 30, 3)]
    for block_bytes in (1, 40, 1 << 20):
        run([tmp_path / name], tmp_path / "out", skip_bad_lines=True, block_bytes=block_bytes, overwrite=True)
        listed = [json.loads(line) for line in (tmp_path / "out.bad_lines.jsonl").read_text().splitlines()]
        assert [(entry["line"], entry["byte"]) for entry in listed] == places

    def die(progress: Progress) -> None:
        if progress.documents > 7:
            raise KeyboardInterrupt

    job = Job(find_sources([str(tmp_path / name)]), str(tmp_path / "killed"), recipe(), workers=0, block_bytes=40)
    job = replace(job, skip_bad_lines=True, journal_seconds=0.0, resume=True)
    with pytest.raises(KeyboardInterrupt):
        preprocess(job, report=die)
    preprocess(job)
    assert (tmp_path / "killed.bad_lines.jsonl").read_bytes() == (tmp_path / "out.bad_lines.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_compressed_input_gives_the_same_bytes(tmp_path: Path, texts: list[str]) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts)
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(source.read_bytes())
    run([source], tmp_path / "plain")
    run([tmp_path / "b.jsonl.gz"], tmp_path / "out", workers=2, block_bytes=500)
    assert corpus_bytes(tmp_path / "out") == corpus_bytes(tmp_path / "plain")


def test_zstandard_input_gives_the_same_bytes_and_is_refused_when_cut(tmp_path: Path, texts: list[str]) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts)
    raw = source.read_bytes()
    packed = b"".join(zstandard.ZstdCompressor().compress(part) for part in (raw[:1000], raw[1000:]))
    (tmp_path / "b.jsonl.zst").write_bytes(packed)
    run([source], tmp_path / "plain")
    run([tmp_path / "b.jsonl.zst"], tmp_path / "out", block_bytes=500)
    assert corpus_bytes(tmp_path / "out") == corpus_bytes(tmp_path / "plain")
    (tmp_path / "c.jsonl.zst").write_bytes(packed[:-9])
    with pytest.raises(DataError, match="c.jsonl.zst is damaged after byte"):
        run([tmp_path / "c.jsonl.zst"], tmp_path / "cut")


def test_several_keys_make_a_corpus_each(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"title": "T", "text": "ab"}\n{"title": "", "text": "c"}\n')
    run([tmp_path / "a.jsonl"], tmp_path / "out", recipe=recipe(keys=("text", "title")))
    assert read_by_description(tmp_path / "out_text_document") == [[[97, 98, EOD]], [[99, EOD]]]
    assert read_by_description(tmp_path / "out_title_document") == [[[84, EOD]]]


def test_sentences_become_sequences_of_one_document(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["ab. c.", "", "d"])
    run([source], tmp_path / "out", recipe=recipe(split_sentences=lambda text: text.split(" ")))
    assert read_by_description(tmp_path / "out_text_sentence") == [[[97, 98, 46], [99, 46, EOD]], [[100, EOD]]]


def test_sidecar_describes_sources_tokenizer_and_files(tmp_path: Path, texts: list[str]) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts)
    run([source], tmp_path / "out", about={"tokenizer": {"digest": "d"}})
    sidecar = json.loads((tmp_path / "out_text_document.meta.json").read_text())
    for suffix, found in sidecar["files"].items():
        raw = (tmp_path / f"out_text_document.{suffix}").read_bytes()
        assert found == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    raw = source.read_bytes()
    assert sidecar["sources"] == [{"path": str(source), "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}]
    assert sidecar["tokenizer"] == {"digest": "d"}
    assert sidecar["tokens"] == sum(len(text.encode()) + 1 for text in texts if text)


def test_bad_line_stops_with_its_place_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": 1}\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2, byte 15: key 'text' holds a number"):
        run([tmp_path / "a.jsonl"], tmp_path / "out", workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_skipped_lines_are_counted_and_listed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": 1}\n\n{"text": "c"}\n')
    done = run([tmp_path / "a.jsonl"], tmp_path / "out", skip_bad_lines=True, block_bytes=1)
    assert read_by_description(tmp_path / "out_text_document") == [[[97, 98, EOD]], [[99, EOD]]]
    listed = [json.loads(line) for line in (tmp_path / "out.bad_lines.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["byte"]) for entry in listed] == [(2, 15), (3, 27)]
    assert done.skipped == 2


def test_id_outside_of_the_vocabulary_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["abc"])
    with pytest.raises(DataError, match="the tokenizer gave id 99, outside of its 98 ids"):
        run([source], tmp_path / "out", recipe=recipe(vocab_size=98))


def test_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["abc"])
    run([source], tmp_path / "out")
    before = corpus_bytes(tmp_path / "out")
    with pytest.raises(DataError, match="exists already"):
        run([source], tmp_path / "out")
    assert corpus_bytes(tmp_path / "out") == before


def test_too_little_space_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["abc" * 100])
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(DataError, match="GB free"):
        run([source], tmp_path / "out")


def test_line_that_is_too_long_is_named(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["ok", "x" * 3_000_000])
    with pytest.raises(DataError, match=r"a.jsonl, line 2, byte 15: .*longer than 1000000 bytes"):
        run([source], tmp_path / "out", max_line_bytes=1_000_000)


def test_input_that_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("")
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("nothing.jsonl", "no input file"),
        ("a.pdf", "no suffix that says"),
        ("empty", "no input file"),
    ):
        with pytest.raises(DataError, match=message):
            find_sources([str(tmp_path / path)])
    write_lines(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(DataError, match="given twice"):
        find_sources([str(tmp_path / "a.jsonl")] * 2)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("change", ARCHIVE_DAMAGES.values(), ids=ARCHIVE_DAMAGES)
def test_each_damage_of_an_archive_is_named(tmp_path: Path, change: Callable[[bytes], bytes], suffix: str) -> None:
    line = (json.dumps({"text": os.urandom(40_000).hex()}) + "\n").encode()
    packed = gzip.compress(line) if suffix == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress(line)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(change(packed))
    with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix} (is damaged after byte|is empty)"):
        run([tmp_path / f"a.jsonl.{suffix}"], tmp_path / "out", skip_bad_lines=True)


def slow_recipe() -> Recipe:
    def encode(text: str) -> list[int]:
        time.sleep(0.004)
        return list(text.encode())

    return recipe(encode=encode)


def run_slowly(source: Path, output: Path) -> None:
    run([source], output, recipe=slow_recipe(), workers=2, block_bytes=300, journal_seconds=0.02, resume=True)


def test_killed_runs_resume_to_the_same_bytes(tmp_path: Path, texts: list[str]) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts[:150])
    run([source], tmp_path / "plain")
    context = multiprocessing.get_context("fork")
    draw = random.Random(1)
    kills = 0
    for _ in range(40):
        process = context.Process(target=run_slowly, args=(source, tmp_path / "out"))
        process.start()
        process.join(0.15 + draw.random() * 0.15)
        if process.exitcode is not None:
            break
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        kills += 1
    else:
        run_slowly(source, tmp_path / "out")
    assert kills > 0
    assert corpus_bytes(tmp_path / "out") == corpus_bytes(tmp_path / "plain")
    assert not (tmp_path / "out.journal.json").exists()


def test_resume_with_another_input_is_refused(tmp_path: Path, texts: list[str]) -> None:
    source = write_lines(tmp_path / "a.jsonl", [*texts, "x"])
    with source.open("a") as file:
        file.write("broken\n")
    with pytest.raises(DataError, match="not JSON"):
        run([source], tmp_path / "out", block_bytes=300, journal_seconds=0.0)
    assert (tmp_path / "out.journal.json").exists()
    write_lines(source, texts)
    with pytest.raises(DataError, match="sources changed since"):
        run([source], tmp_path / "out", resume=True)


def test_worker_that_dies_is_reported(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["abc"] * 50)
    with pytest.raises(DataError, match="a worker process died with exit code -9"):
        run(
            [source],
            tmp_path / "out",
            workers=2,
            recipe=recipe(encode=lambda text: os.kill(os.getpid(), signal.SIGKILL)),
            block_bytes=100,
        )


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("compressed", [True, False])
def test_long_lines_give_the_same_bytes_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, ascii_only: bool, compressed: bool
) -> None:
    draw = random.Random(3)
    letters = ["a1 ", "word", "\n", " ", "\\", '"', "é", "中", "😀", "\t", "/"]
    records = [
        {
            "text": "".join(draw.choices(letters, k=draw.choice([5, 400]))),
            "other": ["x" * draw.choice([2, 300]), {"a": 1}],
        }
        for _ in range(60)
    ]
    content = "".join(json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records).encode()
    source = tmp_path / ("a.jsonl.gz" if compressed else "a.jsonl")
    source.write_bytes(gzip.compress(content) if compressed else content)
    run([source], tmp_path / "plain")
    for module, name, value in (
        ("documents", "LONG_LINE_BYTES", 50),
        ("long_line", "LONG_STRING_BYTES", 100),
        ("long_line", "PIECE", 40),
        ("lines", "PIECE", 40),
        ("documents", "SPOOL_BYTES", 10),
    ):
        monkeypatch.setattr(f"megalm.data.{module}.{name}", value)
    run([source], tmp_path / "out", recipe=recipe(splittable=True), workers=2, block_bytes=500)
    assert corpus_bytes(tmp_path / "out") == corpus_bytes(tmp_path / "plain")
    assert not list(tmp_path.glob("*.lines"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "' + b"a" * 500 + b"\xff" + b'"}', "not UTF-8"),
        (b'{"text": "' + b"a" * 500 + b"\\ud800 " + b'"}', "half a surrogate pair"),
        (b'{"text": "' + b"a" * 500 + b"\\q" + b'"}', "not JSON"),
        (b'{"text": "' + b"a" * 500, "not JSON"),
        (b'{"text": "a", "other": "' + b"a" * 500 + b"\x01" + b'"}', "not JSON"),
        (b'{"other": "' + b"a" * 500 + b'"}', "no key 'text'"),
    ],
)
def test_broken_long_lines_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, reason: str) -> None:
    for module, name, value in (("documents", "LONG_LINE_BYTES", 50), ("long_line", "LONG_STRING_BYTES", 100)):
        monkeypatch.setattr(f"megalm.data.{module}.{name}", value)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=f"line 2, byte 17: {reason}"):
        run([tmp_path / "a.jsonl"], tmp_path / "out", recipe=recipe(splittable=True))


def test_kill_between_the_names_of_a_corpus_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["abc"] * 5)
    run([source], tmp_path / "plain")

    def die(prefix: str) -> None:
        os.replace(f"{prefix}.bin.tmp", f"{prefix}.bin")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megalm.data.preprocess.commit", die)
        with pytest.raises(KeyboardInterrupt):
            run([source], tmp_path / "out")
    run([source], tmp_path / "out", resume=True)
    assert corpus_bytes(tmp_path / "out") == corpus_bytes(tmp_path / "plain")


def test_second_writer_of_an_output_is_refused_and_the_first_is_not_disturbed(tmp_path: Path, texts: list[str]) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts)
    run([source], tmp_path / "plain")
    refused = []

    def start_another(progress: Progress) -> None:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=exit_code_of_run, args=(source, tmp_path / "out"))
        process.start()
        process.join()
        refused.append(process.exitcode)

    run([source], tmp_path / "out", report=start_another)
    assert refused == [9]
    assert corpus_bytes(tmp_path / "out") == corpus_bytes(tmp_path / "plain")
    assert not list(tmp_path.glob("*.tmp"))


def exit_code_of_run(source: Path, output: Path) -> None:
    try:
        run([source], output, overwrite=True)
    except DataError as error:
        os._exit(9 if f"another process is writing {output}" in str(error) else 8)

"""The gathered corpus is distinct, shuffled by its seed alone, and whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.data.corpus import SUFFIXES, builtin_docstrings, installed_folders, text_files, write_corpus
from megalm.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small installation: forty distinct files, a copy, a file of another encoding, another kind, a cache."""
    root = tmp_path / "installed"
    for i in range(40):
        path = root / f"package{i % 4}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# module {i} é\n" + f"value_{i} = {i}\n" * 30, encoding="utf-8")
    (root / "copy.py").write_bytes((root / "package0" / "module0.py").read_bytes() + b"\n\n")
    (root / "latin1.txt").write_bytes("é".encode("latin-1") * 300)
    (root / "data.bin").write_bytes(b"x" * 1000)
    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "cached.py").write_text("cached = 1\n" * 100)
    return root


def write(folder: Path, output: Path, **options: int) -> list[dict[str, str]]:
    """The documents of a corpus gathered from `folder`."""
    settings = {"seed": 1, "target_bytes": 10**9, "required_bytes": 1, **options}
    write_corpus(output, [folder], **settings)
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_each_text_is_there_once_and_unfit_files_are_not(folder: Path, tmp_path: Path) -> None:
    sources = [d["source"] for d in write(folder, tmp_path / "c.jsonl") if not d["source"].startswith("builtin/")]
    assert sorted(sources) == sorted({*(f"package{i % 4}/module{i}.py" for i in range(1, 40)), "copy.py"})


def test_order_depends_on_the_seed_alone(folder: Path, tmp_path: Path) -> None:
    first, again = (write(folder, tmp_path / name, seed=1) for name in ("a.jsonl", "b.jsonl"))
    other = write(folder, tmp_path / "c.jsonl", seed=2)
    assert first == again
    assert first != other
    assert sorted(d["text"] for d in first) == sorted(d["text"] for d in other)


def test_gathering_stops_at_the_target(folder: Path, tmp_path: Path) -> None:
    documents = write(folder, tmp_path / "c.jsonl", target_bytes=5_000)
    sizes = [len(d["text"].encode()) for d in documents]
    assert sum(sizes[:-1]) < 5_000 <= sum(sizes)


def test_too_little_text_is_an_error_that_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="9999.0 MB are needed"):
        write(folder, tmp_path / "c.jsonl", required_bytes=9_999_000_000)
    assert list(tmp_path.glob("c.jsonl*")) == []


def test_an_output_that_cannot_be_written_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="cannot write the corpus"):
        write(folder, tmp_path / "file" / "c.jsonl")


def test_modules_without_source_contribute_their_docstrings() -> None:
    documents = {d.source: d.text for d in builtin_docstrings()}
    assert "len" in documents["builtin/builtins"]


def test_the_installed_python_offers_sources() -> None:
    folders = installed_folders()
    path, name = next(text_files(folders))
    assert path.is_file()
    assert name.endswith(SUFFIXES)

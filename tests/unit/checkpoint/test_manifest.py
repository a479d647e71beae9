from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint import layout
from megalm.checkpoint.durable import write_text
from megalm.checkpoint.manifest import Manifest, read_manifest, verify
from megalm.errors import CheckpointError


def checkpoint(folder: Path, *, step: int = 1) -> Manifest:
    folder.mkdir()
    records = tuple(write_text(folder / name, name * 100) for name in ("a.pt", "b.pt"))
    manifest = Manifest(step=step, layout={"tp": 1}, model={}, versions={"torch": "2"}, files=records)
    write_text(folder / layout.MANIFEST, manifest.to_json())
    return manifest


def test_manifest_reads_back_equal(tmp_path: Path) -> None:
    written = checkpoint(tmp_path / "c")
    assert read_manifest(tmp_path / "c") == written
    assert verify(tmp_path / "c", written) == []


def test_every_single_flipped_bit_is_found(tmp_path: Path) -> None:
    manifest = checkpoint(tmp_path / "c")
    file = tmp_path / "c" / "b.pt"
    intact = file.read_bytes()
    for bit in range(0, len(intact) * 8, 97):
        damaged = bytearray(intact)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        assert len(verify(tmp_path / "c", manifest)) == 1, f"bit {bit}"


def test_every_flipped_bit_of_the_manifest_itself_is_found(tmp_path: Path) -> None:
    checkpoint(tmp_path / "c")
    file = tmp_path / "c" / layout.MANIFEST
    intact = file.read_bytes()
    for bit in range(len(intact) * 8):
        damaged = bytearray(intact)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            read_manifest(tmp_path / "c")


def test_missing_short_and_linked_files_are_named(tmp_path: Path) -> None:
    manifest = checkpoint(tmp_path / "c")
    (tmp_path / "c" / "a.pt").write_bytes(b"short")
    (tmp_path / "elsewhere").write_bytes((tmp_path / "c" / "b.pt").read_bytes())
    (tmp_path / "c" / "b.pt").unlink()
    missing = verify(tmp_path / "c", manifest)
    assert "a.pt has 5 bytes, not 400" in missing[0]
    assert missing[1].endswith("b.pt is missing")
    (tmp_path / "c" / "b.pt").symlink_to(tmp_path / "elsewhere")
    assert verify(tmp_path / "c", manifest)[1].endswith("b.pt is a link")


@pytest.mark.parametrize(
    "name",
    [
        "../a.pt",
        "/etc/passwd",
        "x/a.pt",
        "",
        ".",
        "..",
        "a\0",
        "..\\a",
        7,
        None,
        "zero/../a.pt",
        "zero/a/../../b",
        "zero//a",
        "zero/a/b/c.pt",
    ],
)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: Any) -> None:
    manifest = checkpoint(tmp_path / "c")
    hostile = replace(manifest, files=(replace(manifest.files[0], name=name),))
    (tmp_path / "c" / layout.MANIFEST).write_text(hostile.to_json())
    with pytest.raises(CheckpointError, match="no plain file name"):
        read_manifest(tmp_path / "c")


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"step": -1},
        {"step": "1"},
        {"files": [{"name": "a"}]},
        {"files": None},
        {"layout": []},
        {"files": [{"name": "a", "bytes": True, "sha256": "0" * 64}]},
        {"files": [{"name": "a", "bytes": 1, "sha256": "0" * 64}] * 2},
    ],
)
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    manifest = checkpoint(tmp_path / "c")
    (tmp_path / "c" / layout.MANIFEST).write_text(json.dumps({**json.loads(manifest.to_json()), **change}))
    with pytest.raises(CheckpointError, match="no manifest of format 1"):
        read_manifest(tmp_path / "c")


def test_a_folder_without_manifest_was_never_published(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="never published"):
        read_manifest(tmp_path)

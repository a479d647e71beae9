from __future__ import annotations

import errno
import hashlib
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from megalm.checkpoint import durable
from megalm.checkpoint.tensor_files import write_tensors


def test_record_is_that_of_the_bytes_on_the_disk(tmp_path: Path) -> None:
    content = b"ab" * (1 << 20)  # large enough to be hashed beside the write
    record = durable.write_file(tmp_path / "x.bin", lambda file: [file.write(content), file.write(b"!")] and None)
    on_disk = (tmp_path / "x.bin").read_bytes()
    assert on_disk == content + b"!"
    assert record == durable.FileRecord("x.bin", len(on_disk), hashlib.sha256(on_disk).hexdigest())


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(FileExistsError):
        durable.write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"


def test_every_byte_arrives_when_writes_are_short() -> None:
    class Reluctant:
        name = "reluctant"

        def __init__(self) -> None:
            self.taken = b""

        def write(self, data: memoryview) -> int:
            self.taken += bytes(data[:3])
            return min(3, len(data))

    file = Reluctant()
    durable.write_all(file, b"0123456789")  # type: ignore[arg-type]
    assert file.taken == b"0123456789"


@pytest.mark.parametrize("first", [0, 3, 8])
def test_what_the_disk_said_is_what_is_reported_when_torch_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    calls = iter(range(1000))
    original = durable.write_all

    def fill(file: BinaryIO, data: bytes) -> None:
        if next(calls) >= first:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file, data)

    monkeypatch.setattr(durable, "write_all", fill)
    with pytest.raises(OSError, match="No space left on device"):
        write_tensors(tmp_path / "x.pt", {"weight": torch.ones(5000)})


def test_an_error_that_passes_is_tried_again_when_torch_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1000))
    original = durable.write_all

    def stutter(file: BinaryIO, data: bytes) -> None:
        if next(calls) == 3:
            raise OSError(errno.EIO, "Input/output error")
        original(file, data)

    monkeypatch.setattr(durable, "write_all", stutter)
    write_tensors(tmp_path / "x.pt", {"weight": torch.ones(5000)})
    assert torch.load(tmp_path / "x.pt")["weight"].sum() == 5000


@pytest.mark.parametrize("failing", ["open_new", "write_all", "sync", "rename", "sync_folder"])
def test_latest_is_the_old_or_the_new_text_wherever_a_replacement_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    latest = tmp_path / "latest"
    durable.replace_text(latest, "global_step1")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, failing, fail)
    with pytest.raises(OSError):
        durable.replace_text(latest, "global_step2")
    assert latest.read_text() == ("global_step2" if failing == "sync_folder" else "global_step1")
    monkeypatch.undo()
    durable.replace_text(latest, "global_step3")
    assert latest.read_text() == "global_step3"


def test_publishing_over_an_older_folder_leaves_one_of_them_whole_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, replaced = tmp_path / "global_step1", tmp_path / "global_step1.old"
    final.mkdir()
    (final / "x").write_text("old")
    new = tmp_path / "global_step1.tmp"
    new.mkdir()
    (new / "x").write_text("new")
    whole: list[bool] = []

    def watch(name: str) -> None:
        original = getattr(durable, name)

        def watched(*args: Path) -> None:
            original(*args)
            whole.append(any((folder / "x").is_file() for folder in (final, replaced)))

        monkeypatch.setattr(durable, name, watched)

    for name in ("rename", "sync_folder", "remove_tree"):
        watch(name)
    durable.publish_folder(new, final, replaced=replaced)
    assert whole
    assert all(whole)
    assert (final / "x").read_text() == "new"
    assert not replaced.exists()


def failing_times(monkeypatch: pytest.MonkeyPatch, number: int, *, times: int) -> list[float]:
    """Let the first `times` fsyncs fail with an errno; returns the list that the pauses go to."""
    pauses: list[float] = []
    original, left = durable.sync, [times]

    def sync(file: BinaryIO) -> None:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(number, "injected")
        original(file)

    monkeypatch.setattr(durable, "sync", sync)
    monkeypatch.setattr(durable.time, "sleep", pauses.append)
    return pauses


def test_an_error_that_passes_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = failing_times(monkeypatch, errno.EIO, times=2)
    record = durable.write_text(tmp_path / "x", "content")
    assert (tmp_path / "x").read_text() == "content"
    assert record.bytes == 7
    assert pauses == list(durable.RETRY_PAUSES_SECONDS[:2])


@pytest.mark.parametrize("number, pauses", [(errno.ENOSPC, 0), (errno.EROFS, 0), (errno.EIO, 3)])
def test_an_error_that_stays_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, pauses: int
) -> None:
    slept = failing_times(monkeypatch, number, times=9)
    with pytest.raises(OSError) as caught:
        durable.write_text(tmp_path / "x", "content")
    assert caught.value.errno == number
    assert len(slept) == pauses

from __future__ import annotations

import hashlib
import random
import threading
from pathlib import Path

import pytest

from megalm.checkpoint import stream
from megalm.checkpoint.durable import FileRecord
from megalm.checkpoint.stream import StreamedFile


def test_everything_is_written_and_hashed_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_AHEAD_BYTES", 5_000)
    monkeypatch.setattr(stream, "_BLOCK_BYTES", 700)
    generator = random.Random(0)
    chunks = [generator.randbytes(generator.randrange(4_000)) for _ in range(60)]
    released: list[int] = []
    with StreamedFile(tmp_path / "file") as file:
        for number, chunk in enumerate(chunks):
            file.put(memoryview(chunk), lambda number=number: released.append(number))
    content = b"".join(chunks)
    assert (tmp_path / "file").read_bytes() == content
    assert file.record == FileRecord("file", len(content), hashlib.sha256(content).hexdigest())
    assert sorted(released) == list(range(60))


def test_no_more_is_ahead_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_AHEAD_BYTES", 1_000)
    gate, put = threading.Event(), threading.Semaphore(0)

    class Waiting:
        def update(self, data: memoryview) -> None:
            gate.wait(10)

    monkeypatch.setattr(stream.hashlib, "sha256", Waiting)

    def produce() -> None:
        with StreamedFile(tmp_path / "file") as file:
            for _ in range(5):
                file.put(memoryview(bytes(600)))
                put.release()

    thread = threading.Thread(target=produce)
    thread.start()
    assert put.acquire(timeout=10)
    assert put.acquire(timeout=10)
    assert not put.acquire(timeout=0.2)
    gate.set()
    thread.join(10)
    assert (tmp_path / "file").stat().st_size == 3_000


@pytest.mark.parametrize("operation", ["write_all", "sync"])
def test_a_failing_disk_is_an_error_and_every_buffer_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream, operation, fail)
    released: list[int] = []

    def write() -> None:
        with StreamedFile(tmp_path / "file") as file:
            for number in range(3):
                file.put(memoryview(bytes(100)), lambda number=number: released.append(number))

    with pytest.raises(OSError, match="No space left"):
        write()
    assert released
    assert released == list(range(len(released)))


def test_what_the_caller_raises_passes(tmp_path: Path) -> None:
    def write() -> None:
        with StreamedFile(tmp_path / "file") as file:
            file.put(memoryview(bytes(100)))
            raise KeyError("mine")

    with pytest.raises(KeyError):
        write()

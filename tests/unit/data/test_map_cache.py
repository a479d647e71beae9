from __future__ import annotations

import errno
import multiprocessing
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from megalm.data import array_cache, map_cache
from megalm.data.array_cache import Entry
from megalm.data.blend import deal, normalised
from megalm.data.folder_lock import folder_lock
from megalm.data.map_cache import MAP_PARTS as PARTS
from megalm.data.map_cache import cached_dealing, cached_sample_map
from megalm.data.order import BIGSCIENCE, MEGATRON_CORE, Order
from megalm.data.sample_map import SampleMap, build_sample_map
from megalm.errors import DataError
from tests.support.damaged_corpora import CACHE_FAULTS

LENGTHS = np.arange(1, 60, dtype=np.int32)


def cached(
    folder: Path,
    *,
    lengths: npt.NDArray[np.int32] = LENGTHS,
    order: Order = BIGSCIENCE,
    log: Callable[[str], None] | None = None,
    **change: int,
) -> SampleMap:
    fields = {"end": 50, "num_samples": 40, "seq_length": 8, "seed": 1, **change}
    return cached_sample_map(
        str(folder / "corpus"),
        "train",
        lengths,
        (0, fields.pop("end")),
        **fields,
        order=order,
        cache_path=str(folder / "cache"),
        log=log,
    )


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache").iterdir() if path.name != ".lock")


def test_second_call_reads_what_the_first_built(tmp_path: Path) -> None:
    first = cached(tmp_path)
    (entry,) = entries(tmp_path)
    stamp = (entry / "samples.npy").stat().st_mtime_ns
    second = cached(tmp_path)
    assert entries(tmp_path) == [entry]
    assert (entry / "samples.npy").stat().st_mtime_ns == stamp
    for part in ("documents", "samples", "shuffle"):
        assert np.array_equal(getattr(first, part), getattr(second, part))


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": LENGTHS[::-1].copy()},
        {"end": 49},
        {"num_samples": 41},
        {"seq_length": 9},
        {"seed": 2},
        {"order": MEGATRON_CORE},
    ],
    ids=lambda change: next(iter(change)),
)
def test_anything_that_changes_the_map_changes_the_key(tmp_path: Path, change: dict) -> None:
    cached(tmp_path)
    cached(tmp_path, **change)
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize("fault", CACHE_FAULTS)
def test_each_fault_of_a_cached_map_is_named_and_the_map_is_built_again(tmp_path: Path, fault: str) -> None:
    whole = cached(tmp_path)
    expected = [getattr(whole, part).copy() for part in PARTS]
    (entry,) = entries(tmp_path)
    damage, message = CACHE_FAULTS[fault]
    damage(entry)
    said: list[str] = []
    found = cached(tmp_path, log=said.append)
    assert len(said) == 1
    assert re.search(message, said[0])
    assert "built again" in said[0]
    assert [getattr(found, part).tolist() for part in PARTS] == [array.tolist() for array in expected]
    assert entries(tmp_path) == [entry]
    cached(tmp_path, log=said.append)
    assert len(said) == 1


def build_after(barrier, folder: Path, count: Path) -> None:  # noqa: ANN001
    def counting(*arguments: object, **options: object) -> SampleMap:
        with count.open("a") as file:
            file.write("built\n")
        time.sleep(0.05)  # long enough for every other process to find that the entry is absent
        return build_sample_map(*arguments, **options)

    map_cache.build_sample_map = counting
    barrier.wait()
    assert cached(folder).num_samples >= 40


def run_at_once(targets: list[tuple[Path, Path]]) -> list[int | None]:
    """Exit codes of processes that each ask for the map in (folder, where to count builds)."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(targets))
    processes = [context.Process(target=build_after, args=(barrier, *target)) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    return [process.exitcode for process in processes]


def test_of_many_processes_at_once_one_builds(tmp_path: Path) -> None:
    assert run_at_once([(tmp_path, tmp_path / "count")] * 8) == [0] * 8
    assert len(entries(tmp_path)) == 1
    assert (tmp_path / "count").read_text().splitlines() == ["built"]


@pytest.mark.parametrize("damaged", [False, True])
def test_those_who_waited_read_what_was_built_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """Thousands of ranks that read a map of gigabytes one after the other would take an hour."""
    if damaged:
        cached(tmp_path)
        (entry,) = entries(tmp_path)
        (entry / "map.json").write_text("{")
    together = threading.Barrier(4, timeout=20.0)
    read, build = array_cache.read_entry, map_cache.build_sample_map
    builders: list[int] = []

    def read_with_the_others(entry: Entry) -> dict[str, npt.NDArray[np.int64]]:
        found = read(entry)
        if threading.get_ident() not in builders:
            together.wait()
        return found

    def build_slowly(*arguments: object, **options: object) -> SampleMap:
        builders.append(threading.get_ident())
        time.sleep(1.0)
        return build(*arguments, **options)

    monkeypatch.setattr(array_cache, "read_entry", read_with_the_others)
    monkeypatch.setattr(map_cache, "build_sample_map", build_slowly)
    with ThreadPoolExecutor(5) as threads:
        found = [job.result() for job in [threads.submit(cached, tmp_path) for _ in range(5)]]
    assert len(builders) == 1
    assert len({one.shuffle.tobytes() for one in found}) == 1


def test_hosts_that_share_no_folder_build_once_each(tmp_path: Path) -> None:
    """What two hosts do whose ranks 0 to 3 see a cache folder of the host alone."""
    hosts = [tmp_path / "first", tmp_path / "second"]
    for host in hosts:
        host.mkdir()
    assert run_at_once([(host, host / "count") for host in hosts for _ in range(4)]) == [0] * 8
    for host in hosts:
        assert len(entries(host)) == 1
        assert (host / "count").read_text().splitlines() == ["built"]


def test_file_system_without_locks_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("megalm.data.folder_lock.fcntl.flock", unsupported)
    assert run_at_once([(tmp_path, tmp_path / "count")] * 4) == [0] * 4
    assert len(entries(tmp_path)) == 1


def test_lock_of_a_process_that_hangs_is_not_waited_for_without_end(tmp_path: Path) -> None:
    with folder_lock(tmp_path) as first, folder_lock(tmp_path, patience_seconds=0.05) as second:
        assert (first, second) == (True, False)
    with folder_lock(tmp_path) as again:
        assert again


def test_what_a_killed_builder_left_is_cleared_away(tmp_path: Path) -> None:
    cached(tmp_path)
    (entry,) = entries(tmp_path)
    shutil.rmtree(entry)
    left = entry.with_name(f".{entry.name}.abc")
    left.mkdir()
    (left / "documents.npy").write_bytes(b"half")
    cached(tmp_path)
    assert entries(tmp_path) == [entry]
    assert not left.exists()


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing anywhere fails as on a read-only file system; root may write whatever a file's mode says."""
    real = os.open

    def refuse(path: str | Path, flags: int, *rest: int, **options: object) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)


def test_maps_built_before_are_read_from_a_read_only_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = cached(tmp_path).shuffle.tolist()
    read_only(monkeypatch)
    assert cached(tmp_path).shuffle.tolist() == expected
    with pytest.raises(DataError, match=r"Read-only file system\n.*set by data.cache_path.*build_index"):
        cached(tmp_path, seed=2)


def test_names_of_entries_stay_in_the_folder_and_within_the_limits_of_file_systems(tmp_path: Path) -> None:
    for label in ("a/../b-../../x", "é" * 120, "a b\n-v/w", "..-.."):
        path = Entry(Path("folder"), "map", label, {"seed": 1}, ("a",)).path
        assert path.parent == Path("folder")
        assert len(path.name.encode()) < 150
        assert path.name.isprintable()


def test_large_dealing_is_stored_and_read_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_cache, "LARGE_DEALING", 1_000)
    weights = normalised([0.2, 0.5, 0.3])
    place = {"prefix": str(tmp_path / "corpus"), "name": "train", "cache_path": str(tmp_path / "cache")}
    cached_dealing(weights, 333, **place)
    assert not (tmp_path / "cache").exists()
    first = cached_dealing(weights, 400, **place)
    monkeypatch.setattr(map_cache, "deal", None)
    again = cached_dealing(weights, 400, **place)
    assert len(entries(tmp_path)) == 1
    for found in (first, again):
        assert found.choices.tolist() == deal(weights, 400).choices.tolist()
        assert found.numbers.tolist() == deal(weights, 400).numbers.tolist()


def test_cache_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match="set by data.cache_path"):
        cached(tmp_path)


def test_read_only_folder_beside_the_corpus_keeps_the_map_in_memory(tmp_path: Path) -> None:
    (tmp_path / "sample_maps").write_text("")
    said: list[str] = []
    found = cached_sample_map(
        str(tmp_path / "corpus"),
        "train",
        LENGTHS,
        (0, 50),
        num_samples=40,
        seq_length=8,
        seed=1,
        order=BIGSCIENCE,
        log=said.append,
    )
    assert found.num_samples >= 40
    assert "are not cached" in said[0]

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from megalm.data.map_cache import cached_sample_map
from megalm.data.order import BIGSCIENCE, MEGATRON_CORE, Order
from megalm.data.sample_map import SampleMap
from megalm.errors import DataError

LENGTHS = np.arange(1, 60, dtype=np.int32)


def cached(
    folder: Path, *, lengths: npt.NDArray[np.int32] = LENGTHS, order: Order = BIGSCIENCE, **change: int
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
    )


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "cache").iterdir())


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


def cut(entry: Path) -> None:
    path = entry / "samples.npy"
    path.write_bytes(path.read_bytes()[:-8])


def flip(entry: Path) -> None:
    raw = bytearray((entry / "documents.npy").read_bytes())
    raw[-3] ^= 1
    (entry / "documents.npy").write_bytes(raw)


def other_dtype(entry: Path) -> None:
    np.save(entry / "shuffle.npy", np.load(entry / "shuffle.npy").astype(np.int64))


def foreign_key(entry: Path) -> None:
    description = json.loads((entry / "map.json").read_text())
    description["key"]["seed"] = 7
    (entry / "map.json").write_text(json.dumps(description))


def pickled(entry: Path) -> None:
    np.save(entry / "shuffle.npy", np.array([{}], dtype=object), allow_pickle=True)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing part": (lambda entry: (entry / "shuffle.npy").unlink(), r"shuffle.npy cannot be read"),
    "cut part": (cut, r"samples.npy cannot be read"),
    "flipped bit": (flip, r"documents.npy does not have the sha256"),
    "other dtype": (other_dtype, r"shuffle.npy is <i8 .* says <u4"),
    "another run's map": (foreign_key, r"made for another seed"),
    "damaged description": (lambda entry: (entry / "map.json").write_text("{"), r"map.json cannot be read"),
    "pickled objects": (pickled, r"shuffle.npy cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_cached_map_has_its_own_error(tmp_path: Path, fault: str) -> None:
    cached(tmp_path)
    (entry,) = entries(tmp_path)
    damage, message = FAULTS[fault]
    damage(entry)
    with pytest.raises(DataError, match=message) as caught:
        cached(tmp_path)
    assert f"delete the folder {entry}" in str(caught.value)


def build_after(barrier, folder: Path) -> None:  # noqa: ANN001
    barrier.wait()
    cached(folder)


def test_many_processes_may_build_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(6)
    processes = [context.Process(target=build_after, args=(barrier, tmp_path)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 6
    assert len(entries(tmp_path)) == 1


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
    assert "is not cached" in said[0]

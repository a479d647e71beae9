from __future__ import annotations

import gc
import resource
from pathlib import Path

import numpy as np
import pytest

from megalm.data.mapped import map_array, map_file


def num_maps(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def test_many_files_are_mapped_with_few_descriptors(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(250)) * 80)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        maps = [map_file(path) for _ in range(1_000)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all(part[-1] == 249 for part in maps)


def test_map_lives_as_long_as_a_view_of_it_and_no_longer(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)) * 100)
    view = map_file(path)[10:].view("<u2")
    gc.collect()
    assert num_maps(path) == 1
    assert int(view[0]) == 10 + 256 * 11
    del view
    gc.collect()
    assert num_maps(path) == 0


@pytest.mark.parametrize("size", [3, 20_000])
def test_maps_cannot_be_written(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(bytes(size))
    with pytest.raises(ValueError, match="read-only"):
        map_file(tmp_path / "file")[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        map_file(tmp_path / "file").flags.writeable = True


def test_small_files_take_no_map(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert map_file(path).tobytes() == b"abc"
    assert num_maps(path) == 0


def test_empty_and_absent_files(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert map_file(tmp_path / "empty").shape == (0,)
    with pytest.raises(FileNotFoundError):
        map_file(tmp_path / "absent")
    with pytest.raises(OSError, match="directory|device"):
        map_file(tmp_path)


@pytest.mark.parametrize("array", [np.arange(12).reshape(6, 2), np.zeros(0, np.uint32), np.arange(5, dtype="<u2")])
def test_arrays_are_what_numpy_saved(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    found = map_array(tmp_path / "a.npy")
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert np.array_equal(found, array)


def test_arrays_of_other_layouts_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.asfortranarray(np.arange(12).reshape(6, 2)))
    with pytest.raises(ValueError, match="by columns"):
        map_array(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickled objects"):
        map_array(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError):
        map_array(tmp_path / "a.npy")

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalm.checkpoint import file_ranges
from megalm.checkpoint.file_ranges import BlockReader, offsets_in_file
from megalm.checkpoint.tensor_files import read_tensors, write_tensors


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 5), "b": (3,), "c": (1000, 11)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_the_bytes_of_a_mapped_tensor_lie_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_ranges, "BLOCK_BYTES", 256)
    write_tensors(tmp_path / "file", state())
    mapped = read_tensors(tmp_path / "file", mmap=True)
    offsets = offsets_in_file(tmp_path / "file", mapped.values())
    reader = BlockReader(num_blocks=2)
    for name, tensor in state().items():
        found = b""
        for data, block in reader.read(tmp_path / "file", offsets[mapped[name].data_ptr()], tensor.nbytes):
            found += bytes_of(data)
            block.give_back()
        assert found == bytes_of(tensor), name


def test_tensors_from_elsewhere_have_no_place(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", state())
    torch.save(state(), tmp_path / "old", _use_new_zipfile_serialization=False)
    assert offsets_in_file(tmp_path / "file", state().values()) == {}
    assert offsets_in_file(tmp_path / "old", read_tensors(tmp_path / "old").values()) == {}
    mapped = read_tensors(tmp_path / "file", mmap=True)
    assert offsets_in_file(tmp_path / "file", [*mapped.values(), torch.ones(3)]) == {}


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    with pytest.raises(OSError, match="ends 5 bytes early"):
        list(BlockReader().read(tmp_path / "file", 5, 10))

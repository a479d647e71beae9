"""Where in a torch file its memory-mapped tensors lie, for bytes that only move from one file into another.

Reading them in blocks and writing the blocks takes half the processor time of writing from the mapping.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import torch
from torch import Tensor

BLOCK_BYTES = 8 * 1024 * 1024
_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a zip entry: fixed part of 30 bytes, whose last two fields are the lengths of name and extra field."""


def offsets_in_file(path: Path, tensors: Iterable[Tensor]) -> dict[int, int]:
    """By address of its first byte, each tensor's offset in the file that it is mapped from.

    Empty unless all of them fit one mapping of the file: then they were read into memory, or made anew.
    """
    mapped = [tensor for tensor in tensors if tensor.is_contiguous()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in mapped}
    records = dict(_storage_records(path)) if storages and zipfile.is_zipfile(path) else {}
    if not records:
        return {}
    base = min(storages) - min(records)
    if any(records.get(address - base) != size for address, size in storages.items()):
        return {}
    return {tensor.data_ptr(): tensor.data_ptr() - base for tensor in mapped}


def _storage_records(path: Path) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of each tensor storage in a torch file."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for entry in archive.infolist():
            if entry.filename.split("/")[-2:-1] == ["data"] and entry.compress_type == zipfile.ZIP_STORED:
                file.seek(entry.header_offset)
                name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                yield entry.header_offset + _LOCAL_HEADER.size + name + extra, entry.file_size


@dataclass(frozen=True)
class Block:
    """Some bytes of a file in a buffer that is used again once it is given back."""

    data: Tensor
    home: Queue[Tensor]

    def give_back(self) -> None:
        """Let the buffer be used again."""
        self.home.put(self.data)


class BlockReader:
    """Reads ranges of files into a few buffers, each of which waits to be given back."""

    def __init__(self, num_blocks: int = 6) -> None:
        self._free: Queue[Tensor] = Queue()
        for _ in range(num_blocks):
            self._free.put(torch.empty(BLOCK_BYTES, dtype=torch.uint8))

    def read(self, path: Path, offset: int, count: int) -> Iterator[tuple[Tensor, Block]]:
        """The bytes in order: what a block holds of them, and the block.

        Raises: OSError if the file is shorter.
        """
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while count > 0:
                buffer = self._free.get()
                wanted = buffer[: min(count, BLOCK_BYTES)]
                view = wanted.numpy().data
                filled = 0
                while filled < wanted.numel():
                    got = file.readinto(view[filled:])
                    if not got:
                        self._free.put(buffer)
                        raise OSError(f"{path} ends {count - filled} bytes early")
                    filled += got
                count -= filled
                yield wanted, Block(buffer, self._free)

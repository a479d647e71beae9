"""safetensors files written as a stream: the header from the shapes, then one tensor after the other.

Format: u64 length of the header, the header as JSON, then the raw little-endian bytes at the offsets it gives.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalm.checkpoint.durable import FileRecord, HashingFile, write_file

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Entry:
    """A tensor that a file will hold."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(path: Path, entries: list[Entry], tensors: Iterable[Tensor]) -> FileRecord:
    """Create a file of `entries`, whose data `tensors` yields in the same order. Holds one tensor at a time.

    Raises: ValueError if a tensor is not the one that was announced.
    """

    def produce(file: HashingFile) -> None:
        file.write(_header(entries))
        for entry, tensor in zip(entries, tensors, strict=True):
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise ValueError(f"{entry} was announced, {tuple(tensor.shape)} {tensor.dtype} came")
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    return write_file(path, produce)


def _header(entries: list[Entry]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.num_bytes
        content[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text

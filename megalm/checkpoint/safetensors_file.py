"""safetensors files written as a stream: the header from the shapes, then one tensor after the other.

Format: u64 length of the header, the header as JSON, then the raw little-endian bytes at the offsets it gives.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalm.checkpoint.durable import FileRecord
from megalm.checkpoint.stream import StreamedFile

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


@dataclass(frozen=True)
class Bytes:
    """Part of a tensor's data, contiguous; `release` is called when they are needed no more."""

    tensor: Tensor
    release: Callable[[], None] | None = None


def write_safetensors(path: Path, entries: list[Entry], pieces: Iterable[Iterable[Bytes]]) -> FileRecord:
    """Create a file of `entries`; `pieces` yields, in the same order, the parts that each one's data concatenate from.

    Holds what `StreamedFile` does.
    Raises: ValueError if a tensor is not the one that was announced.
    """
    with StreamedFile(path) as file:
        file.put(memoryview(_header(entries)))
        for entry, parts in zip(entries, pieces, strict=True):
            written = 0
            for part in parts:
                if part.tensor.dtype != entry.dtype:
                    raise ValueError(f"{entry} was announced, {part.tensor.dtype} came")
                data = part.tensor.view(-1).view(torch.uint8).numpy().data
                written += data.nbytes
                file.put(data, part.release)
            if written != entry.num_bytes:
                raise ValueError(f"{entry} was announced, {written} bytes came")
    return file.record


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

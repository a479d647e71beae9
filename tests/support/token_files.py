"""`.bin/.idx` files read and written by a few lines made from the description of the format alone."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

TYPES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


def write_by_description(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], *, code: int = 8) -> None:
    """Documents of sequences of ids, without any code of megalm."""
    sequences = [sequence for document in documents for sequence in document]
    size = struct.calcsize(TYPES[code])
    pointers, address = [], 0
    for sequence in sequences:
        pointers.append(address)
        address += len(sequence) * size
    bounds = [0]
    for document in documents:
        bounds.append(bounds[-1] + len(document))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    index += struct.pack(f"<{len(sequences)}q", *pointers) + struct.pack(f"<{len(bounds)}q", *bounds)
    Path(f"{prefix}.idx").write_bytes(index)
    tokens = b"".join(struct.pack(f"<{len(sequence)}{TYPES[code]}", *sequence) for sequence in sequences)
    Path(f"{prefix}.bin").write_bytes(tokens)


def read_by_description(prefix: Path) -> list[list[list[int]]]:
    """Documents of sequences of ids, without any code of megalm."""
    index, tokens = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, count, num_bounds = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    lengths = struct.unpack_from(f"<{count}i", index, 34)
    pointers = struct.unpack_from(f"<{count}q", index, 34 + 4 * count)
    bounds = struct.unpack_from(f"<{num_bounds}q", index, 34 + 12 * count)
    assert len(index) == 34 + 12 * count + 8 * num_bounds
    sequences = [
        list(struct.unpack_from(f"<{length}{TYPES[code]}", tokens, pointer))
        for length, pointer in zip(lengths, pointers, strict=True)
    ]
    return [sequences[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]

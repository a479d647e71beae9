"""Token corpora on disk: `PREFIX.bin` holds the ids back to back, `PREFIX.idx` says where each sequence lies.

The format is the memory-mapped one of Megatron and BigScience, little-endian throughout:
`.idx` = magic (9 bytes), u64 version 1, u8 dtype code, u64 S sequences, u64 D document bounds, int32[S] lengths in
tokens, int64[S] byte offsets into `.bin`, int64[D] document bounds in sequences, the first 0 and the last S.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.mapped import map_file
from megalm.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")

DTYPE_CODES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
"""Codes that mean the same in every trainer. 6 and 7 are floats that differ between projects; ids are not floats."""

SMALL_VOCABULARY = 65_500
"""Vocabularies below this many ids are stored as u16; the other trainers choose the same bound."""


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype that the other trainers choose for a vocabulary: u16 below 65,500 ids, else i32."""
    return np.dtype("<u2") if vocab_size < SMALL_VOCABULARY else np.dtype("<i4")


def dtype_code(dtype: np.dtype[Any]) -> int:
    """The code of `dtype` in an index header."""
    for code, known in DTYPE_CODES.items():
        if known == dtype:
            return code
    raise DataError(f"token dtype {dtype} has no code in the .idx format\n  dtypes that fit: {_dtype_names()}")


def index_path(prefix: str | Path) -> Path:
    """Where the index of a corpus lies."""
    return Path(f"{prefix}.idx")


def tokens_path(prefix: str | Path) -> Path:
    """Where the token ids of a corpus lie."""
    return Path(f"{prefix}.bin")


def sidecar_path(prefix: str | Path) -> Path:
    """Where the description of a corpus lies: counts, hashes, and what it was made of."""
    return Path(f"{prefix}.meta.json")


@dataclass(frozen=True)
class Header:
    """The fixed part of an index."""

    dtype: np.dtype[Any]
    num_sequences: int
    num_bounds: int

    @property
    def file_bytes(self) -> int:
        """Size that the whole index file must have."""
        return HEADER.size + 12 * self.num_sequences + 8 * self.num_bounds

    def pack(self) -> bytes:
        """The bytes at the start of the file."""
        return HEADER.pack(MAGIC, VERSION, dtype_code(self.dtype), self.num_sequences, self.num_bounds)


def read_header(path: Path) -> Header:
    """Parse and check the fixed part of an index and the size of its file.

    Raises: DataError that names the field, its value and the remedy.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER.size)
        file_bytes = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if raw[: len(LEGACY_MAGIC)] == LEGACY_MAGIC:
        raise DataError(
            f"{path} is a legacy TNTIDX index (dataset-impl lazy or cached), which is not read\n"
            "  tokenize the corpus again with tools/preprocess_data.py, which writes the mmap format"
        )
    if raw[: len(MAGIC)] != MAGIC[: len(raw)] or not raw:
        raise DataError(f"{path} is no token index: it starts with {raw[:9]!r}, an index with {MAGIC!r}")
    if len(raw) < HEADER.size:
        raise DataError(f"{path} is cut off in its header: {len(raw)} bytes of {HEADER.size}\n  copy the file again")
    _, version, code, num_sequences, num_bounds = HEADER.unpack(raw)
    if version != VERSION:
        raise DataError(f"{path}: index version {version} is unknown\n  versions that can be read: {VERSION}")
    if code not in DTYPE_CODES:
        raise DataError(f"{path}: dtype code {code} does not name an integer type\n  codes that fit: {_dtype_names()}")
    header = Header(DTYPE_CODES[code], num_sequences, num_bounds)
    if header.file_bytes != file_bytes:
        raise DataError(
            f"{path}: {num_sequences} sequences and {num_bounds} document bounds need {header.file_bytes} bytes, "
            f"the file has {file_bytes}\n  the file is cut off, or its header is damaged: copy it again"
        )
    if num_bounds < 1:
        raise DataError(f"{path}: 0 document bounds; even an empty corpus has the bound 0")
    return header


def fingerprint(lengths: npt.NDArray[np.int32]) -> str:
    """Digest of the lengths of a corpus."""
    return hashlib.sha256(np.ascontiguousarray(lengths).data).hexdigest()


class IndexedDataset:
    """Random access to the sequences of one corpus, without loading it.

    Raises: DataError on opening, for each way in which header, lengths, offsets, bounds and file sizes can disagree.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        _check_exists(self.prefix)
        path = index_path(prefix)
        header = read_header(path)
        self.dtype = header.dtype
        self.num_sequences = header.num_sequences
        raw, tokens = _mapped(path), _mapped(tokens_path(prefix))
        lengths_end = HEADER.size + 4 * header.num_sequences
        pointers_end = lengths_end + 8 * header.num_sequences
        self.lengths: npt.NDArray[np.int32] = _part(raw, HEADER.size, lengths_end, np.dtype("<i4"))
        self.pointers: npt.NDArray[np.int64] = _part(raw, lengths_end, pointers_end, np.dtype("<i8"))
        self.document_index: npt.NDArray[np.int64] = _part(raw, pointers_end, header.file_bytes, np.dtype("<i8"))
        _check_index(path, header, self.lengths, self.pointers, self.document_index, len(tokens))
        self.num_tokens = len(tokens) // self.dtype.itemsize
        self.tokens: npt.NDArray[Any] = tokens.view(self.dtype)
        self._itemsize = self.dtype.itemsize

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        """Another process opens the files again instead of receiving their content."""
        return (IndexedDataset, (self.prefix,))

    def __len__(self) -> int:
        return self.num_sequences

    @cached_property
    def content(self) -> str:
        """Digest of the lengths: all of a corpus that an order of its samples depends on."""
        return fingerprint(self.lengths)

    @property
    def num_documents(self) -> int:
        """Documents, each one or more sequences."""
        return len(self.document_index) - 1

    def get(self, i: int, offset: int = 0, length: int | None = None) -> npt.NDArray[Any]:
        """Tokens [offset, offset + length) of sequence `i`, as a read-only view of the file; to its end by default."""
        if not 0 <= i < self.num_sequences:
            raise IndexError(f"sequence {i} of {self.num_sequences} in {self.prefix}")
        size = int(self.lengths[i])
        stop = size if length is None else offset + length
        if not 0 <= offset <= stop <= size:
            raise IndexError(f"tokens {offset}:{stop} of sequence {i}, which has {size}, in {self.prefix}")
        start = int(self.pointers[i]) // self._itemsize
        return self.tokens[start + offset : start + stop]

    def document(self, i: int) -> npt.NDArray[Any]:
        """All tokens of document `i`, sentences joined."""
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents} in {self.prefix}")
        first, last = int(self.document_index[i]), int(self.document_index[i + 1])
        if first == last:
            return self.tokens[:0]
        start = int(self.pointers[first]) // self._itemsize
        stop = int(self.pointers[last - 1]) // self._itemsize + int(self.lengths[last - 1])
        return self.tokens[start:stop]


def _part(raw: npt.NDArray[np.uint8], start: int, stop: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return raw[start:stop].view(dtype)


def _mapped(path: Path) -> npt.NDArray[np.uint8]:
    try:
        return map_file(path)
    except OSError as error:
        raise DataError(f"cannot map {path} into memory: {error.strerror}") from error


def _dtype_names() -> str:
    return ", ".join(f"{code} {dtype.name}" for code, dtype in DTYPE_CODES.items())


def shown(name: str) -> str:
    """A file name as a message shows it: in quotes and escaped where it is empty or would break the line."""
    return name if name and name.isprintable() else repr(name)


def _check_exists(prefix: str) -> None:
    """Both files of a corpus are there, and are files."""
    if not prefix.strip():
        raise DataError(f"the name {prefix!r} of a corpus is empty\n  give the path of its .bin without the suffix")
    paths = (tokens_path(prefix), index_path(prefix))
    problems = {str(path): _problem(path) for path in paths}
    if not any(problems.values()):
        return
    other = [f"{shown(name)} {problem}" for name, problem in problems.items() if problem not in (None, "missing")]
    missing = " and ".join(shown(name) for name, problem in problems.items() if problem == "missing")
    what = "; ".join([*other, *([f"{missing} missing"] if missing else [])])
    raise DataError(f"no corpus at {shown(prefix)}: {what}\n  {_remedy(prefix)}")


def _problem(path: Path) -> str | None:
    """Why a path is not a file that can be read; None if it is one."""
    try:
        mode = os.stat(path).st_mode
    except ValueError:
        return "holds a zero byte, which no file name can"
    except OSError as error:
        known = {
            errno.ENOENT: "missing",
            errno.ELOOP: "is a loop of symbolic links",
            errno.ENAMETOOLONG: "is longer than the file system allows",
        }
        return known.get(error.errno or 0, f"cannot be reached: {error.strerror}")
    if stat.S_ISDIR(mode):
        return "is a folder"
    return None if stat.S_ISREG(mode) else "is no regular file"


def _remedy(prefix: str) -> str:
    """What to do about a corpus that is not there."""
    if prefix.endswith((".bin", ".idx")) and _problem(Path(prefix)) is None:
        return f"give the prefix without its suffix: {prefix[:-4]}"
    folder, problem = Path(prefix).parent, _problem(Path(prefix).parent)
    if problem != "is a folder":
        return f"the folder {shown(str(folder))} {'does not exist' if problem == 'missing' else problem or 'is a file'}"
    inside = Path(prefix) if _problem(Path(prefix)) == "is a folder" else folder
    near = sorted(str(path)[:-4] for path in inside.glob("*.idx"))[:8]
    if near:
        return f"corpora in {inside}: {', '.join(map(shown, near))}"
    return "make the corpus with tools/preprocess_data.py, or correct the prefix"


def _check_index(
    path: Path,
    header: Header,
    lengths: npt.NDArray[np.int32],
    pointers: npt.NDArray[np.int64],
    bounds: npt.NDArray[np.int64],
    bin_bytes: int,
) -> None:
    """Compare what the index says twice, in one pass of a few milliseconds per million sequences."""
    itemsize = header.dtype.itemsize
    if bin_bytes % itemsize:
        raise DataError(
            f"{tokens_path(str(path)[:-4])}: {bin_bytes} bytes is no multiple of {itemsize}, the size of an id"
        )
    if header.num_sequences:
        shortest = int(lengths.min())
        if shortest < 0:
            at = int(np.argmax(lengths < 0))
            raise DataError(f"{path}: sequence {at} has length {int(lengths[at])}; lengths are 0 or more")
        ends = np.cumsum(lengths, dtype=np.int64)
        ends *= itemsize
        if int(pointers[0]) != 0 or not np.array_equal(pointers[1:], ends[:-1]):
            wrong = np.flatnonzero(pointers[1:] != ends[:-1])
            at = 0 if int(pointers[0]) != 0 else int(wrong[0]) + 1
            expected = int(ends[at - 1]) if at else 0
            raise DataError(
                f"{path}: sequence {at} starts at byte {int(pointers[at])}, "
                f"the lengths before it say {expected}\n  the index is damaged: copy or build it again"
            )
    total_bytes = int(ends[-1]) if header.num_sequences else 0
    if total_bytes != bin_bytes:
        raise DataError(
            f"{path} describes {total_bytes} bytes of tokens, {tokens_path(str(path)[:-4])} has {bin_bytes}\n"
            "  the two files do not belong together, or one is cut off"
        )
    if int(bounds[0]) != 0:
        raise DataError(f"{path}: the first document bound is {int(bounds[0])}; it must be 0")
    if np.any(bounds[1:] < bounds[:-1]):
        at = int(np.argmax(bounds[1:] < bounds[:-1])) + 1
        raise DataError(
            f"{path}: document bound {at} is {int(bounds[at])}, below the one before, {int(bounds[at - 1])}"
        )
    if int(bounds[-1]) != header.num_sequences:
        raise DataError(
            f"{path}: the last document bound is {int(bounds[-1])}; it must be {header.num_sequences}, the sequences"
        )

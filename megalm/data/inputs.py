"""The files of raw text that a corpus is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.errors import DataError

FORMATS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".txt": "text", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: Path
    format: str
    """json: an object a line; text: a document a line; parquet: a document a row."""
    compression: str
    """"", ".gz" or ".zst"."""
    size_bytes: int


@dataclass(frozen=True)
class Position:
    """A place between two documents."""

    source: int = 0
    offset: int = 0
    """Bytes of the uncompressed source before it; rows, if it is a parquet file."""
    line: int = 1
    """Number of the next line, 1 where the work began; no meaning in a parquet file."""


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """The files that paths, folders and glob patterns name, in order; folders and patterns in order of name.

    Raises: DataError for what does not exist or has no known suffix.
    """
    found: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            inside = sorted(entry for entry in path.rglob("*") if entry.is_file() and _format_of(entry) is not None)
            if not inside:
                raise DataError(f"folder {path} holds no input file\n  suffixes that are read: {_suffixes()}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            matches = [Path(match) for match in sorted(_glob(text))]
            if not matches:
                raise DataError(f"no input file {text}")
            found += matches
    once: set[Path] = set()
    for path in found:
        if path in once:
            raise DataError(f"input {path} is given twice")
        once.add(path)
    return [_source(path) for path in found]


def _source(path: Path) -> Source:
    format_name = _format_of(path)
    if format_name is None:
        raise DataError(f"input {path} has no suffix that says what it is\n  suffixes that are read: {_suffixes()}")
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    if compression and format_name == "parquet":
        raise DataError(f"input {path} is a packed parquet file\n  unpack it: parquet compresses its columns itself")
    try:
        with path.open("rb"):
            size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read input {path}: {error.strerror}") from error
    if compression and not size:
        raise DataError(f"input {path} is empty, which no {compression} archive is\n  copy or download it again")
    return Source(path, format_name, compression, size)


def _format_of(path: Path) -> str | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes = suffixes[:-1]
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _glob(pattern: str) -> list[str]:
    import glob

    return glob.glob(pattern, recursive=True)


def _suffixes() -> str:
    lines = [suffix for suffix, name in FORMATS.items() if name != "parquet"]
    return ", ".join(lines) + ", each also with " + " or ".join(COMPRESSIONS) + "; .parquet"

"""What `PREFIX.meta.json` says about a corpus."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalm.data.indexed import index_path, sidecar_path
from megalm.errors import DataError

PIECE = 1 << 20

COUNTS = ("skipped_lines", "empty_documents", "seconds")
"""What the sidecar of a merged corpus adds up."""


def read_sidecar(prefix: str) -> dict[str, Any] | None:
    """The description of a corpus; None where there is none, as for corpora that other tools made.

    Raises: DataError if it is there and cannot be read.
    """
    path = sidecar_path(prefix)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error!r}\n  delete it to use the corpus without hashes") from error
    try:
        for file in (content["files"]["bin"], content["files"]["idx"]):
            if not isinstance(file["sha256"], str) or not isinstance(file["bytes"], int):
                raise ValueError("it holds no hashes")
        _check_kinds(content)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error!r}\n  delete it to use the corpus without hashes") from error
    found: dict[str, Any] = content
    return found


def _check_kinds(content: dict[str, Any]) -> None:
    """Refuse what would break its readers later; a part that is missing or null is fine.

    Raises: ValueError.
    """
    tokenizer, partition = content.get("tokenizer") or {}, content.get("partition") or {}
    kinds: list[tuple[str, Any, type | tuple[type, ...]]] = [
        ("tokenizer", tokenizer, dict),
        ("partition", partition, dict),
        ("sources", content.get("sources") or [], list),
        *((name, content.get(name) or 0, (int, float)) for name in COUNTS),
    ]
    if isinstance(tokenizer, dict):
        kinds.append(("tokenizer.vocab_size", tokenizer.get("vocab_size") or 0, int))
        kinds.append(("tokenizer.probe", tokenizer.get("probe") or [], list))
    if isinstance(partition, dict):
        kinds += [(f"partition.{name}", partition.get(name) or 0, int) for name in ("index", "count")]
    for name, value, kind in kinds:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} is {str(value)[:40]!r}")


def check_index_hash(prefix: str) -> bool:
    """Compare the index, the small file of the two, with its hash; False if there is no sidecar to say it.

    Raises: DataError if they differ.
    """
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        return False
    check_hash(index_path(prefix), sidecar["files"]["idx"])
    return True


def check_hash(path: Path, expected: dict[str, Any], *, read: Callable[[int], None] | None = None) -> None:
    """Compare a file with the size and the sha256 that the sidecar gives; `read` hears of the bytes that were read.

    Raises: DataError if they differ.
    """
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise DataError(f"{path} has {size} bytes, its sidecar says {expected['bytes']}\n  copy the corpus again")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            if read is not None:
                read(len(piece))
    if digest.hexdigest() != expected["sha256"]:
        raise DataError(
            f"{path} does not have the sha256 that its sidecar gives: its content changed since it was written\n"
            "  copy the corpus again, or tokenize it again"
        )

"""How far an unfinished tokenization came, in a file that is replaced whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalm.errors import DataError


def write_journal(path: Path, identity: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Replace the journal."""
    scratch = path.with_suffix(".tmp")
    with scratch.open("w", encoding="utf-8") as file:
        json.dump({"identity": identity, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def read_journal(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The journal of a run of this identity; None if there is none.

    Raises: DataError if it is damaged or of another run.
    """
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stored = content["identity"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot resume: {path} is damaged: {error}\n  start again without --resume") from error
    now: dict[str, Any] = json.loads(json.dumps(identity))
    differing = [name for name in now if stored.get(name) != now[name]]
    if differing:
        raise DataError(
            f"cannot resume: {' and '.join(differing)} changed since {path} was written\n  start again without --resume"
        )
    return content

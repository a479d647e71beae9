"""Where a record goes that another run has left in this one's place."""

from __future__ import annotations

from pathlib import Path


def free_name(path: Path) -> Path:
    """`path` with the first number behind it that no file has: metrics.jsonl.1."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return aside

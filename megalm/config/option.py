"""How a field of the configuration carries its own documentation."""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import Any


def option(default: Any = MISSING, *, doc: str, choices: tuple[Any, ...] = ()) -> Any:
    """A dataclass field whose `doc` is the text of `--help` and whose `choices`, if any, are checked.

    A field without default must be given by a flag or a preset; its absence is one of the collected failures.
    """
    return field(default=default, metadata={"doc": doc, "choices": choices})

"""How a field of the configuration carries its own documentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, field
from typing import Any


def option(
    default: Any = MISSING,
    *,
    doc: str,
    choices: tuple[Any, ...] = (),
    spellings: Mapping[str, Any] | None = None,
    instead: Mapping[str, str] | None = None,
) -> Any:
    """A dataclass field whose `doc` is the text of `--help` and whose `choices`, if any, are checked.

    `spellings` are other trainers' words for choices; `instead` says what to do in place of choices that they have and
    there are none of here, by their name in lower case.

    A field without default must be given by a flag or a preset; its absence is one of the collected failures.
    """
    return field(
        default=default,
        metadata={"doc": doc, "choices": choices, "spellings": spellings or {}, "instead": instead or {}},
    )

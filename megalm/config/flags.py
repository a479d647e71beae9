"""What a command-line flag of the Megatron family means here: a field, a no-op that is true already, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Literal

Action = Literal["set", "command", "noop", "refuse"]
Arity = Literal["0", "?", "1", "+", "*"]
NEGATIONS = ("--no-", "--disable-")


@dataclass(frozen=True)
class Unless:
    """The value of a field with which a flag that changes nothing otherwise is refused."""

    path: str
    value: Any
    note: str
    remedy: str


@dataclass(frozen=True)
class Flag:
    """One flag. `arity` counts the words after it: none, at most one, one, one or more, any number."""

    name: str
    action: Action
    arity: Arity
    target: str = ""
    constant: Any = None
    words: Mapping[str, Any] = field(default_factory=dict, hash=False)
    allowed: tuple[str, ...] = ()
    unless: Unless | None = None
    equals: str = ""
    note: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Family:
    """Flags that are refused together, also with a negation. `*` in a name stands for any text."""

    names: tuple[str, ...]
    note: str
    remedy: str

    def holds(self, name: str, *, patterns: bool) -> bool:
        """Whether a flag belongs here: by its whole name, or, with `patterns`, by the names with a `*`."""
        bare = [f"--{name.removeprefix(negation)}" for negation in NEGATIONS if name.startswith(negation)]
        known = [other for other in self.names if ("*" in other) == patterns]
        return any(fnmatchcase(spelling, other) for spelling in (name, *bare) for other in known)


def takes(name: str, target: str, *, arity: Arity = "1", words: Mapping[str, Any] | None = None) -> Flag:
    """A flag whose words become the value of a field; `words` translates spellings of the Megatron family."""
    return Flag(name, "set", arity, target=target, words=words or {})


def switch(name: str, target: str, constant: Any, note: str = "") -> Flag:
    """A flag without words that gives a field one value."""
    return Flag(name, "set", "0", target=target, constant=constant, note=note)


def command(name: str, arity: Arity, note: str) -> Flag:
    """A flag that steers the parser itself."""
    return Flag(name, "command", arity, note=note)


def noop(
    name: str,
    note: str,
    *,
    arity: Arity = "0",
    allowed: Sequence[str] = (),
    remedy: str = "",
    unless: Unless | None = None,
    equals: str = "",
) -> Flag:
    """A flag whose effect is there without it.

    With `allowed`, for these words alone; with `equals`, for the number at this path of the Config alone.
    """
    return Flag(name, "noop", arity, allowed=tuple(allowed), unless=unless, equals=equals, note=note, remedy=remedy)


def refused(name: str, note: str, remedy: str) -> Flag:
    """A flag that cannot be obeyed; `remedy` says what to do about it."""
    return Flag(name, "refuse", "*", note=note, remedy=remedy)


def family(names: str, note: str, remedy: str) -> Family:
    """Flags, with spaces between them, that cannot be obeyed for one reason."""
    return Family(tuple(names.split()), note, remedy)


def find_flag(name: str) -> Flag | None:
    """What becomes of a flag: of its own, or as one of a family, where whole names go before those with a `*`.

    What is refused is found with underscores for dashes too; what is obeyed or accepted must be written as it is.
    """
    from megalm.config.flag_families import FAMILIES

    if name in flag_table():
        return flag_table()[name]
    for patterns in (False, True):
        for one in FAMILIES:
            if one.holds(name, patterns=patterns):
                return refused(name, one.note, one.remedy)
    dashed = name.replace("_", "-")
    found = find_flag(dashed) if dashed != name else None
    return refused(name, found.note, found.remedy) if found is not None and found.action == "refuse" else None


@lru_cache(maxsize=1)
def flag_table() -> Mapping[str, Flag]:
    """Every flag that the parser knows by its exact name, families aside."""
    from megalm.config.flag_noops import NOOPS
    from megalm.config.flag_refusals import REFUSALS
    from megalm.config.flag_targets import COMMANDS, TARGETS

    table: dict[str, Flag] = {}
    for flag in (*COMMANDS, *TARGETS, *NOOPS, *REFUSALS):
        assert flag.name not in table, f"{flag.name} is listed twice"
        table[flag.name] = flag
    return table

"""Failures are collected first and raised together, so that one run of the program shows all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megalm.config.root import DEFAULT
from megalm.errors import ConfigError


@dataclass(frozen=True)
class Failure:
    """One thing that cannot be obeyed: the value and its rule, where the value came from, and what would work."""

    rule: str
    origin: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        return "\n  ".join(part for part in (self.rule, self.origin, self.remedy) if part)


def raise_if_any(failures: Sequence[Failure]) -> None:
    """Raises: ConfigError with every failure, when there is one."""
    if not failures:
        return
    distinct = list(dict.fromkeys(failures))
    if len(distinct) == 1:
        raise ConfigError(str(distinct[0]))
    listed = "\n".join(f"({number}) {failure}" for number, failure in enumerate(distinct, start=1))
    raise ConfigError(f"{len(distinct)} settings cannot be obeyed\n{listed}")


def origin_of(path: str, source: str) -> str:
    """The words that tell where a value came from."""
    if source == DEFAULT:
        return f"{path} is the default"
    if source.startswith("--"):
        return f"{path} set by {source}"
    if ":" in source:
        return f"{path} set in {source}"
    return f"{path} set by {source}"


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Names that someone who typed `name` may have meant, best first."""
    import difflib

    longer = [other for other in known if name and other.startswith(name)]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return list(dict.fromkeys([*close, *longer[:3]]))[:4]

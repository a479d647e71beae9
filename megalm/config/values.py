"""From the text of a command line, or a YAML value, to the type that a field declares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megalm.config.root import OptionInfo

EXPECTED = {
    "int": "an integer (220_000_000 may be written with underscores)",
    "float": "a finite number",
    "bool": "true or false",
    "str": "one word or path",
    "strings": "one or more values",
    "ints3": "three integers",
}
TRUE_WORDS = ("true", "1", "yes", "on")
FALSE_WORDS = ("false", "0", "no", "off")


def from_text(info: OptionInfo, words: Sequence[str]) -> Any:
    """The value of a field written as command-line words. Raises: ValueError saying what was expected."""
    if info.optional and len(words) == 1 and words[0].lower() in ("none", "null"):
        return None
    if info.kind == "strings":
        return tuple(words)
    if info.kind == "ints3":
        return _three([word for part in words for word in _split(part)])
    if len(words) != 1:
        raise ValueError(f"expected {EXPECTED[info.kind]}, got {len(words)} values")
    return _chosen(info, _scalar(info.kind, words[0]))


def from_yaml(info: OptionInfo, value: Any) -> Any:
    """The value of a field as YAML or JSON gave it. Raises: ValueError saying what was expected."""
    if value is None:
        if info.optional:
            return None
        raise ValueError(f"expected {EXPECTED[info.kind]}, got nothing")
    if info.kind == "strings":
        items = value if isinstance(value, list) else [value]
        return tuple(str(item) for item in items)
    if info.kind == "ints3":
        return _three(value if isinstance(value, list) else _split(str(value)))
    return _chosen(info, _scalar(info.kind, value))


def _scalar(kind: str, value: Any) -> Any:
    if kind == "int":
        return _int(value)
    if kind == "float":
        return _float(value)
    if kind == "bool":
        return _bool(value)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"expected {EXPECTED[kind]}, got {value!r}")


def _int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    raise ValueError(f"expected {EXPECTED['int']}, got {value!r}")


def _float(value: Any) -> float:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError(f"expected {EXPECTED['float']}, got {value!r}")


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if word in TRUE_WORDS or word in FALSE_WORDS:
        return word in TRUE_WORDS
    raise ValueError(f"expected {EXPECTED['bool']}, got {value!r}")


def _split(text: str) -> list[str]:
    """Numbers with spaces or commas between them."""
    return text.replace(",", " ").split()


def _three(items: list[Any]) -> tuple[int, int, int]:
    numbers = [_int(item) for item in items]
    if len(numbers) != 3:
        raise ValueError(f"expected {EXPECTED['ints3']}, got {len(numbers)}")
    return numbers[0], numbers[1], numbers[2]


def _chosen(info: OptionInfo, value: Any) -> Any:
    if not info.choices or value in info.choices:
        return value
    if value in info.spellings:
        return info.spellings[value]
    remedy = info.instead.get(str(value).lower())
    if remedy is not None:
        raise ValueError(remedy)
    spelled = f", or {', '.join(info.spellings)}" if info.spellings else ""
    raise ValueError(f"expected one of {', '.join(map(str, info.choices))}{spelled}, got {value!r}")

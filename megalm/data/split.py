"""Which part of which corpus is training, validation or test data."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megalm.errors import DataError

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Member:
    """One corpus of a group, with its weight and the share [begin, end) of its sequences."""

    prefix: str
    weight: float
    begin: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Group:
    """A named set of corpora that are blended by weight."""

    name: str
    members: tuple[Member, ...]


def parse_proportions(text: str) -> tuple[float, float, float]:
    """`"969, 30, 1"` or `"80/20"` as three shares that add up to 1; missing ones are 0."""
    parts = [part.strip() for part in re.split(r"[,/]", text)]
    try:
        numbers = [float(part) for part in parts]
    except ValueError as error:
        raise DataError(f"split = {text!r} is not a list of numbers\n  for example: 969, 30, 1") from error
    if len(numbers) > 3 or any(number < 0 for number in numbers) or not 0 < sum(numbers) < float("inf"):
        raise DataError(
            f"split = {text!r} must be one to three proportions that are not negative\n  for example: 969, 30, 1"
        )
    numbers += [0.0] * (3 - len(numbers))
    total = sum(numbers)
    return (numbers[0] / total, numbers[1] / total, numbers[2] / total)


def bounds_by_shift(text: str, size: int) -> list[tuple[int, int]]:
    """BigScience's split bounds: shares rounded one by one and added up, then shifted so that the last is `size`."""
    bounds = [0]
    for share in parse_proportions(text):
        bounds.append(bounds[-1] + int(round(share * float(size))))
    surplus = bounds[-1] - size
    bounds = [0] + [bound - surplus for bound in bounds[1:]]
    return [(max(0, begin), max(0, end)) for begin, end in zip(bounds, bounds[1:], strict=False)]


def bounds_by_rounding(text: str, size: int) -> list[tuple[int, int]]:
    """Megatron-Core's split bounds: both ends of each share rounded by themselves."""
    ends = [0.0]
    for share in parse_proportions(text):
        ends.append(ends[-1] + share)
    return [(round(begin * float(size)), round(end * float(size))) for begin, end in zip(ends, ends[1:], strict=False)]


def range_bounds(member: Member, size: int) -> tuple[int, int]:
    """The sequences of a weighted group's START:END share."""
    return (round(member.begin * float(size)), round(member.end * float(size)))


def parse_data_path(words: tuple[str, ...]) -> tuple[Member, ...]:
    """`PREFIX`, or `WEIGHT PREFIX WEIGHT PREFIX ...`."""
    if len(words) == 1:
        return (Member(words[0], 1.0),)
    if not words or len(words) % 2:
        raise DataError(f"data_path has {len(words)} words; give one prefix, or pairs of a weight and a prefix")
    try:
        members = tuple(
            Member(prefix.strip(), _weight(weight, f"data_path, before {prefix},"))
            for weight, prefix in zip(words[::2], words[1::2], strict=True)
        )
    except DataError as error:
        raise DataError(f"{error}\n  give one prefix, or WEIGHT PREFIX WEIGHT PREFIX ...") from error
    _check_total(members, "data_path")
    return members


def parse_group(text: str) -> Group:
    """`"NAME: W START:END PATH, W START:END PATH"` as a group."""
    name, colon, rest = text.partition(":")
    form = '"NAME: WEIGHT START:END PREFIX, WEIGHT START:END PREFIX"'
    if not colon or not name.strip() or re.search(r"\s", name.strip()):
        raise DataError(f"weighted group {text!r} has no name\n  its form is {form}")
    if not name.strip().isprintable() or "/" in name or "\\" in name:
        raise DataError(
            f"the name of weighted group {name.strip()!r} must not hold /, \\ or control characters\n"
            "  it is the name of its loss in logs and of files in the cache"
        )
    members = []
    for part in rest.split(","):
        words = part.split()
        if len(words) != 3:
            raise DataError(
                f"{part.strip()!r} in weighted group {name.strip()!r} has {len(words)} words, not 3\n  form: {form}"
            )
        begin, end = _range(words[1], name.strip())
        members.append(Member(words[2], _weight(words[0], f"group {name.strip()}"), begin, end))
    _check_total(tuple(members), f"group {name.strip()}")
    return Group(name.strip(), tuple(members))


def parse_groups(texts: tuple[str, ...]) -> tuple[Group, ...]:
    """Several groups, whose names must differ."""
    groups = tuple(parse_group(text) for text in texts)
    names = [group.name for group in groups]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two weighted groups are called {name!r}; give each its own name")
    return groups


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError as error:
        raise DataError(f"weight {text!r} in {where} is no number") from error
    if not 0 <= weight < float("inf"):
        raise DataError(f"weight {text} in {where} must be greater than 0, and finite")
    return weight


def _range(text: str, name: str) -> tuple[float, float]:
    try:
        begin, end = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise DataError(f"range {text!r} in group {name!r} is not START:END\n  for example: 0:0.949") from error
    if not 0 <= begin < end <= 1:
        raise DataError(f"range {text} in group {name!r} must fit 0 <= START < END <= 1")
    return begin, end


def _check_total(members: tuple[Member, ...], where: str) -> None:
    if not sum(member.weight for member in members) > 0:
        raise DataError(f"the weights of {where} add up to 0; at least one must be positive")

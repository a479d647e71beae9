from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.data.order import BIGSCIENCE, MEGATRON_CORE
from megalm.data.split import Group, Member, parse_data_path, parse_group, parse_groups
from megalm.errors import DataError


@pytest.mark.parametrize(
    ("text", "size", "bigscience", "megatron"),
    [
        ("969, 30, 1", 1000, [(0, 969), (969, 999), (999, 1000)], [(0, 969), (969, 999), (999, 1000)]),
        ("100,0,0", 7, [(0, 7), (7, 7), (7, 7)], [(0, 7), (7, 7), (7, 7)]),
        ("50/50", 5, [(0, 3), (3, 5), (5, 5)], [(0, 2), (2, 5), (5, 5)]),
        # Shares of 5/3 round up to 2 each, 6 of 5: BigScience shifts all bounds by the one too many.
        ("1,1,1", 5, [(0, 1), (1, 3), (3, 5)], [(0, 2), (2, 3), (3, 5)]),
        ("1", 3, [(0, 3), (3, 3), (3, 3)], [(0, 3), (3, 3), (3, 3)]),
    ],
)
def test_bounds_are_those_of_each_trainer(text: str, size: int, bigscience: list, megatron: list) -> None:
    assert BIGSCIENCE.bounds(text, size) == bigscience
    assert MEGATRON_CORE.bounds(text, size) == megatron


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any),
    st.integers(0, 10_000),
    st.sampled_from([BIGSCIENCE, MEGATRON_CORE]),
)
def test_bounds_cover_every_sequence_once(parts: list, size: int, order) -> None:  # noqa: ANN001
    bounds = order.bounds(",".join(map(str, parts)), size)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == size
    assert all(end == begin for (_, end), (begin, _) in zip(bounds, bounds[1:], strict=False))
    assert all(begin <= end for begin, end in bounds)


@pytest.mark.parametrize("text", ["a,b", "", "1,2,3,4", "-1,2", "0,0", "nan", "inf"])
def test_bad_split_is_refused_with_its_value(text: str) -> None:
    with pytest.raises(DataError, match="split = "):
        BIGSCIENCE.bounds(text, 10)


def test_surplus_of_each_trainer() -> None:
    # ceil(1000 * 0.3001 * 1.005) = ceil(301.6) and ceil(ceil(300.1) * 1.005) = ceil(302.505)
    assert (BIGSCIENCE.share(1000, 0.3001), MEGATRON_CORE.share(1000, 0.3001)) == (302, 303)


def test_data_path_forms() -> None:
    assert parse_data_path(("a",)) == (Member("a", 1.0),)
    assert parse_data_path(("0.3", "a", "0.7", "b")) == (Member("a", 0.3), Member("b", 0.7))


@pytest.mark.parametrize("words", [(), ("1", "a", "2"), ("x", "a"), ("-1", "a"), ("0", "a", "0", "b"), ("inf", "a")])
def test_bad_data_path_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(DataError):
        parse_data_path(words)


def test_weighted_group_form() -> None:
    assert parse_group("TRAIN: 30 0:0.6 data/a, 70 0.1:1 data/b") == Group(
        "TRAIN", (Member("data/a", 30.0, 0.0, 0.6), Member("data/b", 70.0, 0.1, 1.0))
    )


@pytest.mark.parametrize(
    "text",
    ["1 0:1 a", "N: 1 0:1", "N: 1 01 a", "N: 1 0.5:0.4 a", "N: 1 0:1.1 a", "N: x 0:1 a", "N: 1 0:1 a,", "N M: 1 0:1 a"],
)
def test_bad_weighted_group_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        parse_group(text)


def test_groups_with_one_name_are_refused() -> None:
    with pytest.raises(DataError, match="two weighted groups are called 'V'"):
        parse_groups(("V: 1 0:1 a", "V: 1 0:1 b"))

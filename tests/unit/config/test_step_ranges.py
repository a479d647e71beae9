"""Ranges of steps are read exactly or refused with the word that is wrong."""

from __future__ import annotations

import pytest

from megalm.config.step_ranges import parse_step_ranges


def test_both_ends_are_included_and_ranges_come_in_order() -> None:
    assert parse_step_ranges(["2_000-2010", "100-100"]) == (range(100, 101), range(2000, 2011))


@pytest.mark.parametrize("word", ["7", "7-", "9-7", "0-3", "a-b", "1-2-3"])
def test_what_is_no_range_is_named(word: str) -> None:
    with pytest.raises(ValueError, match=word):
        parse_step_ranges(["20-30", word])


def test_overlapping_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="5-9 and 9-12 overlap"):
        parse_step_ranges(["9-12", "5-9"])

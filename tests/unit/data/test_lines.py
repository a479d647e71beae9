from __future__ import annotations

import re

import pytest

from megalm.data.lines import BadLine, read_lines
from tests.support.damaged_input import BROKEN, GOOD


def read(content: bytes, *, keys: tuple[str, ...] = ("text",), kind: str = "json") -> list:
    return list(read_lines(content, format_name=kind, keys=keys, first_line=11, offset=1_000))


@pytest.mark.parametrize("kind", BROKEN)
def test_each_kind_of_broken_line_is_named_with_its_place(kind: str) -> None:
    line, reason = BROKEN[kind]
    found = read(GOOD + line + b"\n" + GOOD)
    assert [type(document) for document in found] == [tuple, BadLine, tuple]
    assert (found[1].line, found[1].offset) == (12, 1_000 + len(GOOD))
    assert re.search(reason, found[1].reason), found[1].reason


def test_last_line_needs_no_line_feed_and_windows_line_ends_are_read() -> None:
    assert read(b'{"text": "a"}\r\n{"text": "b"}') == [("a",), ("b",)]


def test_keys_come_in_the_order_asked_for() -> None:
    assert read(b'{"a": "1", "b": "2", "c": 3}', keys=("b", "a")) == [("2", "1")]


def test_escapes_and_all_characters_survive() -> None:
    assert read(b'{"text": "\\u0041\\ud83d\\ude00\\n\\/"}') == [("A😀\n/",)]


def test_plain_text_has_a_document_a_line() -> None:
    assert read("über\r\n\nlast".encode(), kind="text") == [("über",), ("",), ("last",)]

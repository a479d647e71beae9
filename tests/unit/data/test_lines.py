from __future__ import annotations

import re

import pytest

from megalm.data.lines import BadLine, read_lines

GOOD = b'{"text": "one"}\n'
BROKEN: dict[str, tuple[bytes, str]] = {
    "cut off": (b'{"text": "on', "not JSON at character 10: Unterminated string"),
    "no brace": (b'"text": "one"}', "not JSON at character 7: Extra data"),
    "trailing comma": (b'{"text": "one",}', "not JSON at character"),
    "single quotes": (b"{'text': 'one'}", "not JSON at character 2"),
    "two objects": (b'{"text": "a"}{"text": "b"}', "Extra data"),
    "bare word": (b'{"text": one}', "Expecting value"),
    "control character": (b'{"text": "a\x01b"}', "Invalid control character"),
    "bad escape": (b'{"text": "a\\qb"}', "Invalid \\\\escape"),
    "nan": (b'{"text": "a", "score": NaN}', "NaN is no number"),
    "empty line": (b"", "an empty line"),
    "white line": (b"  \t", "an empty line"),
    "not utf-8": (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 at byte 14"),
    "utf-16": ('{"text": "a"}'.encode("utf-16-le"), "not JSON at character 2"),
    "byte order mark": (b'\xef\xbb\xbf{"text": "a"}', "byte order mark"),
    "nul bytes": (b"\x00" * 12, "not JSON at character 1"),
    "list": (b'["text"]', "a list, not an object"),
    "string": (b'"text"', "a string, not an object"),
    "null": (b"null", "null, not an object"),
    "number": (b"3", "a number, not an object"),
    "no key": (b'{"body": "a"}', "no key 'text'; its keys are body"),
    "text null": (b'{"text": null}', "key 'text' holds null"),
    "text number": (b'{"text": 5}', "key 'text' holds a number"),
    "text list": (b'{"text": ["a"]}', "key 'text' holds a list"),
    "text object": (b'{"text": {"a": 1}}', "key 'text' holds an object"),
    "text boolean": (b'{"text": true}', "key 'text' holds true or false"),
    "key twice": (b'{"text": "a", "text": "b"}', "key 'text' is there twice"),
    "half a surrogate": (b'{"text": "a\\ud800b"}', "half a surrogate pair at character 2"),
    "too deep": (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "huge number": (b'{"text": "a", "x": ' + b"9" * 5_000 + b"}", "not JSON: .*digits"),
}


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

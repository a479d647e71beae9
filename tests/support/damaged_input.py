"""Input documents that are broken, and what the answer to each says."""

from __future__ import annotations

from collections.abc import Callable

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
"""A line of JSON and the reason that is given, by kind."""

ARCHIVE_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda raw: raw[: len(raw) // 2],
    "no checksum": lambda raw: raw[:-4],
    "flipped bit": lambda raw: raw[:1000] + bytes([raw[1000] ^ 1]) + raw[1001:],
    "other file": lambda raw: b"not an archive at all",
    "empty": lambda raw: b"",
    "rubbish at the end": lambda raw: raw + b"trailing rubbish",
}
"""What is done to a compressed file, by kind."""

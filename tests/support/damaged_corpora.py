"""Corpora, cached sample maps and names that are wrong in every way that we know, and what must be said of each."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.support.token_files import write_by_description

DOCUMENTS = [[[1, 2, 3], [4]], [[5, 6]], [[7, 8, 9, 10]]]


def _edit(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def apply(prefix: Path) -> None:
        path = Path(f"{prefix}.idx")
        raw = bytearray(path.read_bytes())
        result = change(raw)
        path.write_bytes(bytes(result) if isinstance(result, bytes | bytearray) else bytes(raw))

    return apply


def _put(form: str, at: int, value: int) -> Callable[[Path], None]:
    return _edit(lambda raw: struct.pack_into(form, raw, at, value))


def _resize_bin(change: int) -> Callable[[Path], None]:
    def apply(prefix: Path) -> None:
        path = Path(f"{prefix}.bin")
        raw = path.read_bytes()
        path.write_bytes(raw[:change] if change < 0 else raw + bytes(change))

    return apply


LENGTHS, POINTERS, BOUNDS = 34, 34 + 16, 34 + 16 + 32
INDEX_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "legacy magic": (_edit(lambda raw: b"TNTIDX\x00\x00" + raw[8:]), "legacy TNTIDX"),
    "other magic": (_edit(lambda raw: b"X" + raw[1:]), "is no token index"),
    "empty index": (_edit(lambda raw: b""), "is no token index"),
    "cut in the magic": (_edit(lambda raw: raw[:5]), "cut off in its header"),
    "cut in the header": (_edit(lambda raw: raw[:20]), "cut off in its header"),
    "version": (_put("<Q", 9, 2), "version 2 is unknown"),
    "dtype code 0": (_put("<B", 17, 0), "dtype code 0"),
    "float dtype": (_put("<B", 17, 6), "dtype code 6"),
    "other dtype": (_put("<B", 17, 4), "starts at byte 6, the lengths before it say 12"),
    "too many sequences": (_put("<Q", 18, 5), "need 126 bytes, the file has 114"),
    "absurd sequences": (_put("<Q", 18, 2**62), "the file has 114"),
    "too few bounds": (_put("<Q", 26, 3), "need 106 bytes, the file has 114"),
    "cut index": (_edit(lambda raw: raw[:-3]), "the file has 111"),
    "negative length": (_put("<i", LENGTHS, -1), "sequence 0 has length -1"),
    "wrong length": (_put("<i", LENGTHS + 4, 2), "sequence 2 starts at byte 8, the lengths before it say 10"),
    "first pointer": (_put("<q", POINTERS, 2), "sequence 0 starts at byte 2"),
    "pointer": (_put("<q", POINTERS + 16, 6), "sequence 2 starts at byte 6"),
    "first bound": (_put("<q", BOUNDS, 1), "first document bound is 1"),
    "falling bounds": (_put("<q", BOUNDS + 8, 4), "document bound 2 is 3, below the one before, 4"),
    "last bound": (_put("<q", BOUNDS + 24, 5), "last document bound is 5; it must be 4"),
    "longer bin": (_resize_bin(2), "describes 20 bytes of tokens, .* has 22"),
    "cut bin": (_resize_bin(-2), "describes 20 bytes of tokens, .* has 18"),
    "odd bin": (_resize_bin(1), "no multiple of 2"),
    "no bin": (lambda prefix: Path(f"{prefix}.bin").unlink(), "bin missing"),
    "no index": (lambda prefix: Path(f"{prefix}.idx").unlink(), "idx missing"),
}


def _cut(entry: Path) -> None:
    path = entry / "samples.npy"
    path.write_bytes(path.read_bytes()[:-8])


def _flip(entry: Path) -> None:
    raw = bytearray((entry / "documents.npy").read_bytes())
    raw[-3] ^= 1
    (entry / "documents.npy").write_bytes(raw)


def _other_dtype(entry: Path) -> None:
    np.save(entry / "shuffle.npy", np.load(entry / "shuffle.npy").astype(np.int64))


def _foreign_key(entry: Path) -> None:
    description = json.loads((entry / "map.json").read_text())
    description["key"]["seed"] = 7
    (entry / "map.json").write_text(json.dumps(description))


def _pickled(entry: Path) -> None:
    np.save(entry / "shuffle.npy", np.array([{}], dtype=object), allow_pickle=True)


def _header(entry: Path) -> None:
    raw = bytearray((entry / "samples.npy").read_bytes())
    raw[12:16] = b"(((("
    (entry / "samples.npy").write_bytes(raw)


def _no_folder(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("")


CACHE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing part": (lambda entry: (entry / "shuffle.npy").unlink(), r"shuffle.npy cannot be read"),
    "cut part": (_cut, r"samples.npy cannot be read"),
    "flipped bit": (_flip, r"documents.npy does not have the sha256"),
    "other dtype": (_other_dtype, r"shuffle.npy is <i8 .* says <u4"),
    "another run's map": (_foreign_key, r"made for another seed"),
    "damaged description": (lambda entry: (entry / "map.json").write_text("{"), r"map.json cannot be read"),
    "pickled objects": (_pickled, r"shuffle.npy cannot be read: it holds pickled objects"),
    "damaged header": (_header, r"samples.npy cannot be read: its header"),
    "no folder": (_no_folder, r"map.json cannot be read: .*Not a directory"),
    "other JSON": (
        lambda entry: (entry / "map.json").write_text('{"key": 1, "parts": []}'),
        r"map.json cannot be read",
    ),
}


def _folders(folder: Path) -> str:
    for suffix in (".bin", ".idx"):
        (folder / f"c{suffix}").mkdir()
    return str(folder / "c")


def _loop(folder: Path) -> str:
    for suffix in (".bin", ".idx"):
        (folder / f"c{suffix}").symlink_to(folder / f"c{suffix}")
    return str(folder / "c")


def _pipes(folder: Path) -> str:
    for suffix in (".bin", ".idx"):
        os.mkfifo(folder / f"c{suffix}")
    return str(folder / "c")


def _dangling(folder: Path) -> str:
    write_by_description(folder / "c", DOCUMENTS)
    (folder / "c.bin").unlink()
    (folder / "c.bin").symlink_to(folder / "gone.bin")
    return str(folder / "c")


BAD_NAMES: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing": (lambda folder: str(folder / "none"), r"no corpus at .*none.bin and .*none.idx missing"),
    "empty": (lambda folder: "", r"the name '' of a corpus is empty"),
    "blank": (lambda folder: " ", r"the name ' ' of a corpus is empty"),
    "a folder": (_folders, r"c.bin is a folder; .*c.idx is a folder"),
    "a loop of links": (_loop, r"c.bin is a loop of symbolic links"),
    "a link to nothing": (_dangling, r"c.bin missing"),
    "a pipe": (_pipes, r"c.bin is no regular file"),
    "a zero byte": (lambda folder: str(folder / "a\0b"), r"'.*a\\x00b' ?.*holds a zero byte"),
    "too long": (lambda folder: str(folder / ("x" * 300)), r"is longer than the file system allows"),
    "a line feed": (lambda folder: str(folder / "a\nb"), r"no corpus at '[^\n]*a\\nb': [^\n]* missing\n"),
    "below a file": (lambda folder: str(Path(__file__) / "c"), r"damaged_corpora.py is a file"),
    "with its suffix": (lambda folder: str(write_named(folder, "c")) + ".bin", r"without its suffix: .*c$"),
}
"""Prefixes that are refused, and what is said."""

GOOD_NAMES = ("with spaces", "日本語-é", "a\nb", "quo'te\"s", "../above/c", "-dash", "percent%20", "#hash")
"""Unusual prefixes that are files' names like others."""

BAD_GROUPS: dict[str, tuple[str, str]] = {
    "leaves its folder": ("../../x: 1 0:1 {prefix}", "group '../../x' must not hold /"),
    "control character": ("a\x1bb: 1 0:1 {prefix}", r"must not hold"),
    "no name": (": 1 0:1 {prefix}", "has no name"),
    "no path": ("a: 1 0:1", "has 2 words, not 3"),
    "two paths": ("a: 1 0:1 {prefix} {prefix}", "has 4 words, not 3"),
    "empty path": ("a: 1 0:1 ,1 0:1 {prefix}", "has 2 words, not 3"),
}
"""Weighted groups whose names or paths are refused."""


def write_named(folder: Path, name: str) -> Path:
    """A whole corpus of that name."""
    prefix = folder / "inside" / name
    prefix.parent.mkdir(parents=True, exist_ok=True)
    write_by_description(prefix, DOCUMENTS)
    return prefix

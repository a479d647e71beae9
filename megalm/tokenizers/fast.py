"""Byte-level BPE through tiktoken: the same ids as the `tokenizers` library, several times faster.

tiktoken always merges the pair whose product has the smallest rank, whatever the pair; `tokenizers` follows a list of
pairs. Both agree if ranks follow that list, each product comes from one pair of the list, and each token, encoded by
itself, is one token: then at every step the only pair that can produce a token is the listed one. `compile_fast`
checks these conditions on the whole vocabulary and refuses everything else that it does not know to be equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import tokenizers

from megalm.tokenizers.byte_level import byte_of_character
from megalm.tokenizers.protocol import Tokenizer
from megalm.tokenizers.unicode_tables import first_difference, probe_model

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How the ByteLevel pre-tokenizer cuts text when it uses its own expression."""

FASTER_PATTERNS = {
    # The same matches by runs that never give characters back; only white space before a word needs to.
    GPT2_PATTERN: r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|\s+(?!\S)|\s"
}

SPLITTABLE = frozenset(FASTER_PATTERNS.values())
SPACE_IN_MARK = re.compile("[0-9A-Za-z][ \n]")

BOUNDARY = "\ufdd0"
"""A code point that is no character, put into text where a piece must end."""

MARKED_GPT2_PATTERN = rf"'(?:s|t|re|ve|m|ll|d)| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}{BOUNDARY}]+|\s+|{BOUNDARY}"
"""GPT-2's pieces without looking ahead, which makes the search twice as fast: white space that must give its last
character to the next piece has a boundary before it."""

WHITE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""What `\\s` matches in tiktoken's expressions."""

Encode = Callable[[str], Sequence[int]]


class NotCompilableError(Exception):
    """Why a tokenizer cannot be run by tiktoken."""


@dataclass(frozen=True)
class Encoder:
    """The way in which a tokenizer's ids are computed."""

    encode: Encode
    """Text to ids, an array or a list."""
    engine: str
    """tiktoken or the tokenizer's own."""
    reason: str
    """Why this one, for the log."""
    splittable: bool = False
    """Whether text cut between an ASCII letter or digit and a space or line feed gives the same ids in pieces."""


def choose_encoder(tokenizer: Tokenizer, sample: Sequence[str], *, requested: str = "auto") -> Encoder:
    """The fastest encoder that gives the ids: proved on the vocabulary, compared on all letters and on `sample`."""
    if requested == "exact":
        return Encoder(tokenizer.encode, "tokenizer", "asked for by --encoder exact")
    backend = getattr(tokenizer, "backend", None)
    if backend is None or not hasattr(backend, "to_str"):
        return Encoder(
            tokenizer.encode, "tokenizer", f"{tokenizer.name} is no byte-level BPE of the tokenizers library"
        )
    try:
        encode = compile_fast(backend)
    except NotCompilableError as error:
        return Encoder(tokenizer.encode, "tokenizers", f"tiktoken would not be equal: {error}")
    for text in sample:
        if list(encode(text)) != tokenizer.encode(text):
            return Encoder(tokenizer.encode, "tokenizers", f"tiktoken differs on {text[:40]!r} of this input")
    spec = json.loads(backend.to_str())
    point = _point_of_disagreement(json.dumps(spec["pre_tokenizer"]))
    if point is not None:
        return Encoder(
            tokenizer.encode,
            "tokenizers",
            f"tiktoken has another table of letters and digits, which differs at U+{point:04X}; a newer version of the "
            "two libraries may agree",
        )
    return Encoder(
        encode,
        "tiktoken",
        f"equal on the whole vocabulary, on letters and digits, and on {len(sample)} documents of this input",
        _splittable(spec),
    )


@lru_cache
def _point_of_disagreement(pre_tokenizer: str) -> int | None:
    """The first code point around which this pre-tokenizer's pieces differ between the two libraries."""
    import tokenizers

    spec = {"version": "1.0", "pre_tokenizer": json.loads(pre_tokenizer), "model": probe_model()}
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    return first_difference(compile_fast(backend), lambda text: backend.encode(text).ids)


def compile_fast(backend: tokenizers.Tokenizer) -> Encode:
    """A tiktoken encoder with the ids of a `tokenizers` tokenizer.

    Raises: NotCompilableError with the first property that tiktoken does not have.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise NotCompilableError("tiktoken is not installed") from error
    spec: dict[str, Any] = json.loads(backend.to_str())
    pattern = _pattern(spec)
    specials = _special_tokens(spec)
    if spec.get("normalizer") is not None:
        raise NotCompilableError(f"it normalises text ({spec['normalizer'].get('type')})")
    if list(backend.encode("").ids):
        raise NotCompilableError("it adds special tokens to every text")
    ranks, ids = _ranks(spec, backend, set(specials))
    offset = len(ids)
    marks = {token: offset + number for number, token in enumerate(specials)}
    table = np.array([*ids, *specials.values()], np.uint32)
    encoding = tiktoken.Encoding("compiled", pat_str=pattern, mergeable_ranks=ranks, special_tokens=marks)
    # The public method searches the text for forbidden special tokens first, of which there are none.
    to_buffer = encoding._core_bpe.encode_to_tiktoken_buffer
    allowed = set(marks)

    def encode(text: str) -> Sequence[int]:
        return table[np.frombuffer(to_buffer(text, allowed), np.uint32)]  # type: ignore[return-value]

    if pattern != FASTER_PATTERNS[GPT2_PATTERN] or BOUNDARY.encode() in ranks:
        return encode
    return _with_boundaries(encode, ranks, table, tuple(marks))


def _with_boundaries(
    exact: Encode, ranks: dict[bytes, int], table: npt.NDArray[np.uint32], marks: tuple[str, ...]
) -> Encode:
    """GPT-2's pieces from text with boundaries; text that holds a special token or a boundary goes to `exact`."""
    import tiktoken

    boundary = len(table)
    encoding = tiktoken.Encoding(
        "marked", pat_str=MARKED_GPT2_PATTERN, mergeable_ranks={**ranks, BOUNDARY.encode(): boundary}, special_tokens={}
    )
    to_buffer = encoding._core_bpe.encode_to_tiktoken_buffer
    nothing: set[str] = set()
    white = np.zeros(ord(max(WHITE)) + 2, bool)
    white[[ord(character) for character in WHITE]] = True

    def encode(text: str) -> Sequence[int]:
        if BOUNDARY in text or any(mark in text for mark in marks):
            return exact(text)
        marked = _marked(text, white)
        found = np.frombuffer(to_buffer(marked, nothing), np.uint32)
        if len(marked) != len(text):
            found = found[found != boundary]
        return table[found]  # type: ignore[return-value]

    return encode


def _marked(text: str, white: npt.NDArray[np.bool_]) -> str:
    """Text with a boundary before the last character of two or more of white space that something follows.

    `white` says so of each code point up to the last one that is; arrays do this three times as fast as an expression.
    """
    if text.isascii():
        points: npt.NDArray[Any] = np.frombuffer(text.encode("ascii"), np.uint8)
    else:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        points = np.minimum(points, len(white) - 1)
    here = white[points]
    cuts = (np.flatnonzero(here[:-2] & here[1:-1] & ~here[2:]) + 1).tolist()
    if not cuts:
        return text
    return BOUNDARY.join([text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)])


def _splittable(spec: dict[str, Any]) -> bool:
    """For the expressions known to start a new piece at a space or line feed after a letter or digit."""
    return _pattern(spec) in SPLITTABLE and not any(SPACE_IN_MARK.search(token) for token in _special_tokens(spec))


def _pattern(spec: dict[str, Any]) -> str:
    """One expression whose matches are the pieces of the pre-tokenizer."""
    steps = spec.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise NotCompilableError("its pre-tokenizer does not end in ByteLevel without a prefix space")
    own = bool(steps[-1].get("use_regex", True))
    if len(steps) == 1 and own:
        return FASTER_PATTERNS.get(GPT2_PATTERN, GPT2_PATTERN)
    if len(steps) != 2 or own or steps[0].get("type") != "Split":
        raise NotCompilableError("its pre-tokenizer is not one regular expression")
    split = steps[0]
    expression = split.get("pattern", {}).get("Regex")
    if expression is None or split.get("behavior") != "Isolated" or split.get("invert"):
        raise NotCompilableError("its pre-tokenizer does not split by isolated matches")
    if expression in FASTER_PATTERNS:
        return FASTER_PATTERNS[expression]
    # What lies between two matches is a piece as well.
    return f"{expression}|(?:(?!{expression})[\\s\\S])+"


def _special_tokens(spec: dict[str, Any]) -> dict[str, int]:
    """Tokens that are cut out of the text before everything else, with their ids."""
    found: dict[str, int] = {}
    for token in spec.get("added_tokens") or []:
        content = token["content"]
        if token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
            raise NotCompilableError(f"its added token {content!r} takes part of the text around it")
        for other in found:
            if content.startswith(other) or other.startswith(content) or content in other or other in content:
                raise NotCompilableError(f"its added tokens {other!r} and {content!r} overlap")
        found[content] = token["id"]
    return found


def _ranks(
    spec: dict[str, Any], backend: tokenizers.Tokenizer, specials: set[str]
) -> tuple[dict[bytes, int], list[int]]:
    """Ranks of byte strings in the order of the merges, and the id of each rank."""
    model = spec["model"]
    if model.get("type") != "BPE":
        raise NotCompilableError(f"its model is {model.get('type')}, not BPE")
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise NotCompilableError(f"its model sets {option}")
    vocabulary: dict[str, int] = model["vocab"]
    byte_of = byte_of_character()
    missing = [character for character in byte_of if character not in vocabulary]
    if missing:
        raise NotCompilableError(f"{len(missing)} of 256 bytes are no token")
    ranks = {bytes([byte_of[character]]): rank for rank, character in enumerate(byte_of)}
    ids = [vocabulary[character] for character in byte_of]
    for pair in model["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        token = left + right
        if token in specials:
            raise NotCompilableError(f"its special token {token!r} is also a product of merges")
        product = bytes(byte_of[character] for character in token)
        if product in ranks:
            raise NotCompilableError(f"two merges produce {token!r}")
        ranks[product] = len(ids)
        ids.append(vocabulary[token])
    if not model.get("ignore_merges"):
        # A token that no merge produces, GPT-2's mark in vocab.json for one, is never given.
        _check_reachable(backend, model["merges"])
    elif len(ids) != len(set(vocabulary) - specials):
        raise NotCompilableError("its vocabulary holds tokens that no merge produces")
    return ranks, ids


def _check_reachable(backend: tokenizers.Tokenizer, merges: Sequence[Any]) -> None:
    for pair in merges:
        token = pair.replace(" ", "") if isinstance(pair, str) else "".join(pair)
        if len(backend.model.tokenize(token)) != 1:
            raise NotCompilableError(f"its token {token!r} is not what its own characters encode to")

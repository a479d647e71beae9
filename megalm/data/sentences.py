"""Sentences of a document, for corpora whose sequences are sentences."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megalm.errors import DataError

SPLITTERS = ("punkt", "rules")

PUNKT_CHARACTERS = 1_000_000
"""Punkt sees this much of a document at a time, as in Megatron-LM's tool; a piece ends a sentence."""

RULES_VERSION = 1

ENDS = r"""[.!?…।॥؟۔]+["'”’»)\]]*"""
WIDE_ENDS = r"[。！？｡]+[」』”’）]*"
CANDIDATE = re.compile(rf"(?P<end>{ENDS})|(?P<wide>{WIDE_ENDS})|\n[^\S\n]*\n")
WHITE = re.compile(r"\s*")
OPENING = re.compile(r"""["'“‘«(\[¿¡]*""")
LAST_WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|\.(?=[^\W\d_]))*\Z")

ABBREVIATIONS = {
    "english": frozenset(
        "adm al approx assn ave bros capt cf cmdr co col cpl dept dr e.g ed eds est et etc fig figs ft gen gov hon i.e "
        "inc jr lt ltd maj messrs mr mrs ms mt no nos op p pp prof rep rev sen sgt sr st vol vols vs viz".split()
    )
}
"""Words that a full stop follows within a sentence. Other languages go without."""


@dataclass(frozen=True)
class SentenceSplitter:
    """How documents are cut."""

    split: Callable[[str], Sequence[str]]
    about: dict[str, Any]
    """For the sidecar: all that the result depends on."""


def open_splitter(kind: str, *, language: str = "english", keep_newlines: bool = False) -> SentenceSplitter:
    """The splitter of a name, `punkt` or `rules`; one is never taken for the other.

    With `keep_newlines` the white space after a sentence stays with it, so that the sentences join to the document;
    otherwise white space between sentences is dropped.
    Raises: DataError if punkt is asked for and nltk or its model of the language is not there.
    """
    about = {"splitter": kind, "language": language, "keep_newlines": keep_newlines}
    if kind == "rules":
        abbreviations = ABBREVIATIONS.get(language, frozenset())
        about["version"] = RULES_VERSION
        return SentenceSplitter(lambda text: _cut(text, _rule_starts(text, abbreviations), keep_newlines), about)
    if kind != "punkt":
        raise DataError(f"sentence splitter {kind!r} does not exist\n  splitters that do: {', '.join(SPLITTERS)}")
    punkt, digest, version = _punkt(language)
    about |= {"model": digest, "nltk": version}

    def split(text: str) -> list[str]:
        found: list[str] = []
        for start in range(0, len(text), PUNKT_CHARACTERS):
            piece = text[start : start + PUNKT_CHARACTERS]
            if keep_newlines:
                found += _cut(piece, (begin for begin, _ in punkt.span_tokenize(piece)), keep_newlines)
            else:
                found += punkt.tokenize(piece)
        return found

    return SentenceSplitter(split, about)


def _punkt(language: str) -> tuple[Any, str, str]:
    """nltk's tokenizer, a digest of its model, and nltk's version."""
    remedy = "\n  --sentence-splitter rules needs neither"
    try:
        module = importlib.import_module("nltk.tokenize.punkt")
        tokenizer = module.PunktTokenizer(language)
    except (ImportError, AttributeError) as error:
        raise DataError(f"--split-sentences needs nltk 3.9 or newer\n  pip install nltk{remedy}") from error
    except (LookupError, ValueError) as error:
        raise DataError(
            f"nltk has no punkt model of the language {language!r}\n"
            f"  python -m nltk.downloader punkt_tab, or set NLTK_DATA to the folder that holds it{remedy}"
        ) from error
    parameters = tokenizer._params
    content = [
        sorted(map(list, parameters.collocations)),
        sorted(parameters.sent_starters),
        sorted(parameters.abbrev_types),
        sorted(parameters.ortho_context.items()),
    ]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return tokenizer, digest, str(importlib.import_module("nltk").__version__)


def _cut(text: str, starts: Iterator[int], keep_newlines: bool) -> list[str]:
    """The text from each start to the next."""
    # White space before the first sentence belongs to it.
    bounds = [0, *(start for number, start in enumerate(starts) if number and start), len(text)]
    parts = [text[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]
    if not keep_newlines:
        parts = [part.strip() for part in parts]
    return [part for part in parts if part]


def _rule_starts(text: str, abbreviations: frozenset[str]) -> Iterator[int]:
    """Where sentences start.

    A sentence ends at a blank line, at a wide mark such as 。 and at other marks, with closing quotes and brackets,
    that white space follows and then no small letter, but not at a full stop after an abbreviation or a single letter.
    """
    yield 0
    for found in CANDIDATE.finditer(text):
        white = WHITE.match(text, found.end())
        start = white.end() if white else found.end()
        if start == len(text):
            return
        if not found["end"] or (start > found.end() and _ends(text, found, start, abbreviations)):
            yield start


def _ends(text: str, found: re.Match[str], start: int, abbreviations: frozenset[str]) -> bool:
    """Whether a mark with white space after it ends a sentence."""
    opening = OPENING.match(text, start)
    first = opening.end() if opening else start
    if text[first : first + 1].islower():
        return False
    if found["end"] != ".":
        return True
    word = LAST_WORD.search(text[max(0, found.start() - 24) : found.start()])
    if word is None:
        return True
    return len(word[0]) > 1 and word[0][-2:-1] != "." and word[0].lower() not in abbreviations

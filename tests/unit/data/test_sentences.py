from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.sentences import open_splitter
from megalm.errors import DataError

TEXT = 'Dr. Smith went. He said "Stop."  And then\nleft! Why?\n\nThe end (really.) No.  \n'
SENTENCES = ["Dr. Smith went.", 'He said "Stop."', "And then\nleft!", "Why?", "The end (really.)", "No."]
CASES = {
    TEXT: SENTENCES,
    "Version 3.14 is out. it is.": ["Version 3.14 is out. it is."],
    "J. R. Smith, e.g. Fig. 3, met A. Jones. They spoke.": [
        "J. R. Smith, e.g. Fig. 3, met A. Jones.",
        "They spoke.",
    ],
    "Wait... What?! “Yes.” ‘No.’ 3 more.": ["Wait...", "What?!", "“Yes.”", "‘No.’", "3 more."],
    "一句。两句！「三句。」四句": ["一句。", "两句！", "「三句。」", "四句"],
    "एक वाक्य। दूसरा वाक्य।": ["एक वाक्य।", "दूसरा वाक्य।"],
    "هل هذا؟ نعم.": ["هل هذا؟", "نعم."],
    "a heading\n \nno full stop": ["a heading", "no full stop"],
    "see http://a.b/c.d?e=f!g": ["see http://a.b/c.d?e=f!g"],
    "": [],
    " \n": [],
}


@pytest.mark.parametrize("text", CASES)
def test_rules_cut_where_sentences_end(text: str) -> None:
    assert open_splitter("rules").split(text) == CASES[text]


@given(st.text(alphabet='aA.!? \n"。)1é', max_size=60))
@settings(max_examples=300, deadline=None)
def test_kept_white_space_makes_sentences_join_to_the_document(text: str) -> None:
    kept = open_splitter("rules", keep_newlines=True).split(text)
    assert "".join(kept) == text
    assert [part.strip() for part in kept if part.strip()] == open_splitter("rules").split(text)


def test_rules_take_linear_time_on_marks_without_end() -> None:
    for text in ("." * 200_000, ". " * 100_000, "\n " * 100_000, '."' * 100_000, "a" * 200_000 + "."):
        open_splitter("rules").split(text)


def test_abbreviations_are_those_of_the_language() -> None:
    assert open_splitter("rules", language="german").split("Am Dr. Hof.") == ["Am Dr.", "Hof."]


def test_missing_nltk_is_an_error_that_names_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk.tokenize.punkt", None)
    with pytest.raises(DataError, match=r"needs nltk 3\.9 or newer\n  pip install nltk\n  --sentence-splitter rules"):
        open_splitter("punkt")


def test_missing_model_is_an_error_that_names_the_language(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(language: str) -> None:
        raise LookupError(language)

    module = types.SimpleNamespace(PunktTokenizer=missing)
    monkeypatch.setattr("importlib.import_module", lambda name: module)
    with pytest.raises(DataError, match="no punkt model of the language 'german'"):
        open_splitter("punkt", language="german")


@pytest.mark.parametrize("keep", [False, True])
def test_punkt_is_that_of_nltk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, keep: bool) -> None:
    nltk = pytest.importorskip("nltk", reason="nltk is no dependency; users of --split-sentences bring it")
    model = tmp_path / "tokenizers" / "punkt_tab" / "english"
    model.mkdir(parents=True)
    for name, content in (("abbrev_types.txt", "dr\n"), ("collocations.tab", ""), ("sent_starters.txt", "")):
        (model / name).write_text(content)
    (model / "ortho_context.tab").write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    splitter = open_splitter("punkt", keep_newlines=keep)
    found = splitter.split(TEXT)
    assert [part.strip() for part in found] == SENTENCES
    assert "".join(found) == TEXT if keep else found == SENTENCES
    assert len(splitter.about["model"]) == 64


class SpanTokenizer:
    """Stands in for nltk's: a sentence is what ends in a full stop; white space lies between."""

    def __init__(self, language: str) -> None:
        self._params = types.SimpleNamespace(
            collocations={("a", "b")}, sent_starters={"the"}, abbrev_types={language}, ortho_context={"a": 1}
        )

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [found.span() for found in re.finditer(r"\S[^.]*\.?", text)]

    def tokenize(self, text: str) -> list[str]:
        return [text[begin:end] for begin, end in self.span_tokenize(text)]


def test_punkt_sees_a_million_characters_at_a_time_and_names_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(PunktTokenizer=SpanTokenizer, __version__="3.9.9")
    monkeypatch.setattr("megalm.data.sentences.PUNKT_CHARACTERS", 7)
    monkeypatch.setattr("importlib.import_module", lambda name: module)
    text = " One.  Two\n\nthree.\n"
    assert open_splitter("punkt").split(text) == ["One.", "Two\n\nth", "ree."]
    kept = open_splitter("punkt", keep_newlines=True)
    assert kept.split(text) == [" One.  ", "Two\n\nth", "ree.\n"]
    assert (kept.about["nltk"], kept.about["keep_newlines"]) == ("3.9.9", True)
    assert kept.about["model"] == open_splitter("punkt").about["model"]
    assert kept.about["model"] != open_splitter("punkt", language="german").about["model"]

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from megalm.tokenizers import fast
from megalm.tokenizers.fast import NotCompilableError, choose_encoder, compile_fast
from megalm.tokenizers.gpt2_bpe import GPT2BPETokenizer
from megalm.tokenizers.huggingface import HuggingFaceTokenizer
from megalm.tokenizers.null import NullTokenizer
from megalm.tokenizers.unicode_tables import first_difference
from tests.unit.tokenizers.conftest import TEXTS

BLOOM_PATTERN = " ?[^(\\s|[.,!?…。，、।۔،])]+"
LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECES = [
    *("'s", "'S", "'re", "'ll", "'d", "''", "a", "Zebra", "é", "e\u0301", "中文", "ß", "ǅ", "ⅷ", "²", "٣", "१", "🏳️‍🌈"),
    *(
        " ",
        "  ",
        "    ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\u200b",
        "\u0085",
        "\x1c",
        "\x00",
        "\ufeff",
    ),
    *(
        ".",
        "...",
        ",",
        "!?",
        "(",
        "|",
        "_",
        "-",
        "#",
        "1",
        "123",
        "4567",
        "。",
        "…",
        "،",
        "<|endoftext|>",
        "<|endof",
        "\U0010ffff",
    ),
]


def with_pattern(folder: Path, pattern: str) -> Tokenizer:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return backend


@pytest.fixture(scope="session", params=["gpt2", "gpt2 files", "bloom", "llama"])
def backend(request: pytest.FixtureRequest, bpe_folder: Path, gpt2_files: tuple[Path, Path]) -> Tokenizer:
    if request.param == "gpt2 files":
        return GPT2BPETokenizer(*gpt2_files).backend
    if request.param == "gpt2":
        return Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    return with_pattern(bpe_folder, BLOOM_PATTERN if request.param == "bloom" else LLAMA_PATTERN)


@pytest.fixture(scope="session")
def encode(backend: Tokenizer) -> Callable:
    return compile_fast(backend)


def check(encode: Callable, backend: Tokenizer, text: str) -> None:
    assert list(encode(text)) == backend.encode(text).ids, repr(text)


def test_every_byte_and_every_pair_of_pieces(encode: Callable, backend: Tokenizer) -> None:
    check(encode, backend, "".join(chr(byte) for byte in range(256)))
    for first in PIECES:
        for second in PIECES:
            check(encode, backend, first + second + "a " + second + first)


@given(st.lists(st.sampled_from(PIECES), max_size=12))
@settings(max_examples=150, deadline=None)
def test_adversarial_strings(encode: Callable, backend: Tokenizer, pieces: list[str]) -> None:
    check(encode, backend, "".join(pieces))


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text(encode: Callable, backend: Tokenizer, text: str) -> None:
    check(encode, backend, text)


def test_long_runs(encode: Callable, backend: Tokenizer) -> None:
    for character in (" ", "\n", "a", "'", "1", "中", ".", "\t "):
        check(encode, backend, "x" + character * 2_000 + "y")


def test_code_points_of_every_kind(encode: Callable, backend: Tokenizer) -> None:
    """Both libraries bring their own tables of letters, digits and spaces: compare them where characters exist."""
    draw = random.Random(0)
    points = [*range(0x3000), *draw.sample(range(0x3000, 0xD800), 1_500), *draw.sample(range(0xE000, 0x32000), 2_500)]
    for start in range(0, len(points), 64):
        text = "".join(f"a{chr(p)}1 {chr(p)}{chr(p)}  {chr(p)}'s" for p in points[start : start + 64])
        check(encode, backend, text)


def test_a_letter_of_one_library_alone_leaves_the_text_to_the_tokenizers_own(
    bpe_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "_point_of_disagreement", lambda pre_tokenizer: 0x1C89)
    found = choose_encoder(HuggingFaceTokenizer(bpe_folder), TEXTS[:4])
    assert found.engine == "tokenizers"
    assert "differs at U+1C89" in found.reason


@pytest.mark.parametrize("point", [0x1C89, 0xA7DA, 0x1E5D0, 0x33FF0])
def test_the_first_letter_of_one_library_alone_is_found(point: int) -> None:
    def encode(text: str) -> list[int]:
        return [ord(character) for character in text]

    def of_one(text: str) -> list[int]:
        return [0 if character == chr(point) else ord(character) for character in text]

    assert first_difference(encode, encode) is None
    assert first_difference(encode, of_one) == point


def test_gpt2_files_and_folders_use_tiktoken(bpe_folder: Path, gpt2_files: tuple[Path, Path]) -> None:
    for tokenizer in (HuggingFaceTokenizer(bpe_folder), GPT2BPETokenizer(*gpt2_files)):
        found = choose_encoder(tokenizer, TEXTS[:4])
        assert found.engine == "tiktoken"
        assert "4 documents" in found.reason


def test_a_token_that_no_merge_produces_is_refused_where_words_are_looked_up_whole(
    gpt2_files: tuple[Path, Path],
) -> None:
    spec = json.loads(GPT2BPETokenizer(*gpt2_files).backend.to_str())
    spec["model"]["ignore_merges"] = True
    with pytest.raises(NotCompilableError, match="holds tokens that no merge produces"):
        compile_fast(Tokenizer.from_str(json.dumps(spec)))


def test_an_end_mark_inside_text_is_characters_to_gpt2s_files(gpt2_files: tuple[Path, Path]) -> None:
    backend = GPT2BPETokenizer(*gpt2_files).backend
    check(compile_fast(backend), backend, "a<|endoftext|>b <|endoftext|>")


def test_ids_that_do_not_follow_the_merges_are_mapped(bpe_folder: Path, tmp_path: Path) -> None:
    spec = json.loads((bpe_folder / "tokenizer.json").read_text())
    names = list(spec["model"]["vocab"])
    random.Random(3).shuffle(names)
    spec["model"]["vocab"] = {name: number for number, name in enumerate(names)}
    spec["added_tokens"][0]["id"] = spec["model"]["vocab"]["<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    encode = compile_fast(backend)
    for text in TEXTS[:4]:
        check(encode, backend, text + "<|endoftext|>" + text)


def changed(folder: Path, change: Callable[[Tokenizer], object]) -> Tokenizer:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(backend)
    return backend


def set_part(name: str, value: object) -> Callable[[Tokenizer], None]:
    return lambda backend: setattr(backend, name, value)


def template(backend: Tokenizer) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_part("normalizer", normalizers.NFC()), "normalises text"),
        (set_part("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), "prefix space"),
        (set_part("pre_tokenizer", pre_tokenizers.Whitespace()), "does not end in ByteLevel"),
        (template, "adds special tokens"),
        (lambda b: b.add_tokens([AddedToken("foo", lstrip=True)]), "takes part of the text around it"),
        (lambda b: b.add_tokens(["<pad>", "<pad>2"]), "overlap"),
        (set_part("model", models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])), "of 256 bytes are no token"),
    ],
)
def test_what_tiktoken_cannot_do_falls_back_with_the_reason(bpe_folder: Path, change: Callable, reason: str) -> None:
    with pytest.raises(NotCompilableError, match=reason):
        compile_fast(changed(bpe_folder, change))


def test_token_with_two_derivations_is_refused(bpe_folder: Path, tmp_path: Path) -> None:
    """By the list b+c, a+b, ab+c the text abc stays a and bc; tiktoken would join them, since abc is a token."""
    spec = json.loads((bpe_folder / "tokenizer.json").read_text())
    characters = [name for name in spec["model"]["vocab"] if len(name) == 1]
    names = [*characters, "bc", "ab", "abc", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    spec["model"]["vocab"] = vocabulary
    spec["model"]["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"]]
    spec["added_tokens"][0]["id"] = vocabulary["<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(NotCompilableError, match="'abc' is not what its own characters encode to"):
        compile_fast(Tokenizer.from_file(str(tmp_path / "tokenizer.json")))


def test_other_tokenizers_keep_their_own_encoder() -> None:
    found = choose_encoder(NullTokenizer(10), ["1 2"])
    assert (found.engine, found.encode("1 2")) == ("tokenizer", [1, 2])


def test_difference_on_the_input_itself_falls_back(bpe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalm.tokenizers.fast.compile_fast", lambda backend: lambda text: [1])
    found = choose_encoder(HuggingFaceTokenizer(bpe_folder), ["abc"])
    assert found.engine == "tokenizers"
    assert "differs on 'abc'" in found.reason

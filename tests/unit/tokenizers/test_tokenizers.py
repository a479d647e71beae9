from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megalm.config.data import DataConfig
from megalm.errors import DataError
from megalm.tokenizers.build import build_tokenizer, open_tokenizer, tokenizer_in
from megalm.tokenizers.gpt2_bpe import GPT2BPETokenizer
from megalm.tokenizers.huggingface import HuggingFaceTokenizer
from megalm.tokenizers.null import NullTokenizer
from megalm.tokenizers.sentencepiece_model import SentencePieceTokenizer
from megalm.tokenizers.train import train_byte_level_bpe, train_sentencepiece
from tests.unit.tokenizers.conftest import TEXTS

HARD = ["", " ", "\n\n  x", "tabs\t\tand   spaces ", "naïve 中文 👍🏽", "it's <|endoftext|> inside", "\x00\x7f\u200b"]


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def sentencepiece_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sentencepiece")
    prefix = tmp_path_factory.mktemp("sp") / request.param
    train_sentencepiece(TEXTS, prefix, vocab_size=420, model_type=request.param)
    return Path(f"{prefix}.model")


@pytest.mark.parametrize("text", [*TEXTS[:4], *HARD])
def test_folder_gives_the_ids_of_transformers(bpe_folder: Path, text: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(bpe_folder)
    ours = HuggingFaceTokenizer(bpe_folder)
    assert ours.encode(text) == theirs.encode(text)
    assert (ours.vocab_size, ours.eod_id) == (len(theirs), theirs.eos_token_id)


@pytest.mark.parametrize("text", [*TEXTS[:4], *HARD])
def test_text_survives_a_round_trip(bpe_folder: Path, text: str) -> None:
    tokenizer = HuggingFaceTokenizer(bpe_folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, "x"]) == [tokenizer.encode(text), tokenizer.encode("x")]


def test_saved_folder_reads_back_equal(bpe_folder: Path, tmp_path: Path) -> None:
    HuggingFaceTokenizer(bpe_folder).save_pretrained(tmp_path / "copy")
    HuggingFaceTokenizer(bpe_folder / "tokenizer.json").save_pretrained(tmp_path / "from_file")
    for folder in ("copy", "from_file"):
        copy = HuggingFaceTokenizer(tmp_path / folder)
        assert copy.eod_id == 0
        assert copy.encode(TEXTS[1]) == HuggingFaceTokenizer(bpe_folder).encode(TEXTS[1])


def test_training_is_reproducible_and_fills_the_vocabulary(bpe_folder: Path, tmp_path: Path) -> None:
    assert train_byte_level_bpe(iter(TEXTS), tmp_path / "again", vocab_size=700) == 700
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (bpe_folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("texts", "size", "message"), [(TEXTS, 256, "no room"), ([], 300, "no text")])
def test_training_without_room_or_text_is_refused(tmp_path: Path, texts: list[str], size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_byte_level_bpe(texts, tmp_path / "t", vocab_size=size)


@pytest.mark.parametrize("text", [*TEXTS[:4], *HARD[:5]])
def test_gpt2_files_give_the_ids_of_the_folder(gpt2_files: tuple[Path, Path], bpe_folder: Path, text: str) -> None:
    tokenizer = GPT2BPETokenizer(*gpt2_files)
    assert tokenizer.encode(text) == HuggingFaceTokenizer(bpe_folder).encode(text)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (700, 0)


def test_the_trainer_gets_long_words_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalm.tokenizers.train.LONGEST_WORD", 4)
    train_byte_level_bpe(["ab" * 50, "abab cd"], tmp_path, vocab_size=300)
    longest = max(HuggingFaceTokenizer(tmp_path).backend.get_vocab(), key=lambda token: len(token) * (token[0] != "<"))
    assert longest == "abab"


def test_a_folder_says_itself_of_what_type_its_tokenizer_is(gpt2_files: tuple[Path, Path], bpe_folder: Path) -> None:
    assert isinstance(tokenizer_in(str(gpt2_files[0].parent)), GPT2BPETokenizer)
    assert isinstance(tokenizer_in(str(bpe_folder)), HuggingFaceTokenizer)
    assert isinstance(tokenizer_in(str(bpe_folder / "tokenizer.json")), HuggingFaceTokenizer)
    with pytest.raises(DataError, match="give the folder's whole path"):
        tokenizer_in("absent")


def test_gpt2_reads_an_end_mark_inside_text_as_characters(gpt2_files: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer = GPT2BPETokenizer(*gpt2_files)
    assert 0 not in tokenizer.encode("a<|endoftext|>b")
    tokenizer.save_pretrained(tmp_path / "hf")
    assert HuggingFaceTokenizer(tmp_path / "hf").encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


@pytest.mark.parametrize("text", [*TEXTS[:4], *HARD[:5]])
def test_sentencepiece_keeps_any_text(sentencepiece_file: Path, text: str) -> None:
    tokenizer = SentencePieceTokenizer(sentencepiece_file)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == 420
    assert tokenizer.eod_id is not None


@pytest.mark.parametrize("text", [*TEXTS[:4], *TEXTS[-20:], *HARD[:5], "  lead", "trail  \n"])
def test_saved_sentencepiece_gives_the_same_ids_in_transformers(
    sentencepiece_file: Path, tmp_path: Path, text: str
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = SentencePieceTokenizer(sentencepiece_file)
    tokenizer.save_pretrained(tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.encode(text) == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.eod_id
    assert theirs.decode(theirs.encode(text), clean_up_tokenization_spaces=False) == text


def test_null_tokenizer_reads_numbers() -> None:
    tokenizer = NullTokenizer(100)
    assert tokenizer.encode("5 0\n99") == [5, 0, 99]
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (101, 100)
    for text in ("5 x", "101", "-1"):
        with pytest.raises(DataError):
            tokenizer.encode(text)


def test_configuration_names_the_tokenizer(bpe_folder: Path) -> None:
    tokenizer = build_tokenizer(DataConfig(seq_length=8, tokenizer_path=str(bpe_folder)))
    assert tokenizer.vocab_size == 700
    assert build_tokenizer(DataConfig(seq_length=8, tokenizer_type="NullTokenizer"), vocab_size=9).vocab_size == 10


def test_reading_a_folder_imports_neither_transformers_nor_torch(bpe_folder: Path) -> None:
    code = (
        "import sys; from megalm.tokenizers.huggingface import HuggingFaceTokenizer as T; "
        f"T({str(bpe_folder)!r}).encode('a'); assert not {{'transformers', 'torch'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def broken_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def no_eos(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')


def two_ends(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"eos_token": ["<a>", "<b>"]}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_json, "is no tokenizer that the tokenizers library reads"),
        (no_eos, "names eos_token '<nowhere>'"),
        (two_ends, "eos_token is .*, and one token can end documents"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer.json; it holds"),
    ],
)
def test_broken_folder_is_named(bpe_folder: Path, tmp_path: Path, damage, message: str) -> None:  # noqa: ANN001
    HuggingFaceTokenizer(bpe_folder).save_pretrained(tmp_path / "t")
    damage(tmp_path / "t")
    with pytest.raises(DataError, match=message):
        HuggingFaceTokenizer(tmp_path / "t")


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("PretrainedFromHF", {}, "needs --tokenizer-name-or-path"),
        ("PretrainedFromHF", {"path": "/nowhere"}, "no such file or folder"),
        ("PretrainedFromHF", {"path": "some/name"}, "or download it"),
        ("GPT2BPETokenizer", {}, "needs --vocab-file"),
        ("GPT2BPETokenizer", {"vocab_file": "v", "merge_file": "m"}, "no file v"),
        ("SentencePieceTokenizer", {"path": "/nowhere"}, "no SentencePiece model"),
        ("NullTokenizer", {}, "pass --vocab-size"),
        ("Other", {}, "does not exist"),
    ],
)
def test_missing_tokenizer_is_an_error_that_says_what_to_give(kind: str, fields: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_tokenizer(kind, **fields)

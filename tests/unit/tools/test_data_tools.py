"""The data tools as their users run them: real command lines, real files, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.token_files import read_by_description

ROOT = Path(__file__).resolve().parents[3]
TEXTS = [f"def function_{i}(x):\n    return x + {i}  # it's number {i}\n" for i in range(120)]


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")


def succeeds(name: str, *arguments: object) -> str:
    done = tool(name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    for name, texts in (("all", TEXTS), ("one", TEXTS[:50]), ("two", TEXTS[50:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    succeeds("train_tokenizer.py", "--input", folder / "all.jsonl", "--vocab-size", 400, "--output", folder / "tok")
    for name in ("all", "one", "two"):
        preprocess(folder, name, folder / f"{name}.jsonl")
    return folder


def preprocess(folder: Path, output: str, *inputs: Path) -> str:
    arguments = ["--input", *inputs, "--tokenizer-name-or-path", folder / "tok", "--append-eod"]
    return succeeds("preprocess_data.py", *arguments, "--workers", 2, "--output-prefix", folder / output)


def test_corpus_decodes_to_the_input_with_an_end_after_each_document(work: Path) -> None:
    from megalm.tokenizers.huggingface import HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer(work / "tok")
    documents = read_by_description(work / "all_text_document")
    assert [tokenizer.decode(ids[:-1]) for (ids,) in documents] == TEXTS
    assert {ids[-1] for (ids,) in documents} == {tokenizer.eod_id}


def test_merged_corpora_are_the_corpus_of_the_joined_input(work: Path) -> None:
    parts = [work / "one_text_document", work / "two_text_document"]
    succeeds("merge_datasets.py", "--input", *parts, "--output-prefix", work / "merged")
    preprocess(work, "both", work / "one.jsonl", work / "two.jsonl")
    for suffix in (".bin", ".idx"):
        merged = Path(f"{work}/merged{suffix}").read_bytes()
        assert merged == Path(f"{work}/all_text_document{suffix}").read_bytes()
        assert merged == Path(f"{work}/both_text_document{suffix}").read_bytes()


def test_inspection_shows_counts_histogram_and_text(work: Path) -> None:
    said = succeeds(
        "inspect_dataset.py", work / "all_text_document", "--document", 7, "--tokenizer-name-or-path", work / "tok"
    )
    assert "120 documents" in said
    assert "█" in said
    assert "def function_7(x)" in said


def test_sentencepiece_models_are_trained_and_used(work: Path) -> None:
    pytest.importorskip("sentencepiece")
    for kind in ("bpe", "unigram"):
        succeeds(
            "train_tokenizer.py",
            *(
                "--input",
                work / "all.jsonl",
                "--model-type",
                kind,
                "--vocab-size",
                291,
                "--output",
                work / f"{kind}.model",
            ),
        )
        said = succeeds(
            "preprocess_data.py",
            *("--input", work / "all.jsonl", "--output-prefix", work / kind, "--append-eod"),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-name-or-path", work / f"{kind}.model"),
        )
        assert "120 documents" in said


def test_flag_spellings_of_other_trainers_are_accepted(work: Path) -> None:
    succeeds(
        "preprocess_data.py",
        *("--input", work / "one.jsonl", "--json-keys", "text", "--tokenizer-type", "PretrainedFromHf"),
        *("--tokenizer-model", work / "tok", "--output-prefix", work / "spelled", "--dataset-impl", "mmap"),
        *("--workers", 1, "--log-interval", 10),
    )
    assert len(read_by_description(work / "spelled_text_document")) == 50


@pytest.mark.parametrize(
    ("name", "arguments", "code", "message"),
    [
        (
            "preprocess_data.py",
            "--input {w}/none.jsonl --output-prefix {w}/x --tokenizer-model {w}/tok",
            3,
            "no input file",
        ),
        (
            "preprocess_data.py",
            "--input {w}/all.jsonl --output-prefix {w}/x --tokenizer-model {w}/none",
            3,
            "no tokenizer at",
        ),
        (
            "preprocess_data.py",
            "--input {w}/all.jsonl --output-prefix {w}/all --tokenizer-model {w}/tok",
            3,
            "exists already",
        ),
        (
            "preprocess_data.py",
            "--input {w}/all.jsonl --output-prefix {w}/all.jsonl/x --tokenizer-model {w}/tok",
            3,
            "cannot write",
        ),
        (
            "preprocess_data.py",
            "--input {w}/tok/tokenizer.json --output-prefix {w}/x --tokenizer-model {w}/tok",
            3,
            "line 1, byte 0",
        ),
        ("preprocess_data.py", "--inp {w}/all.jsonl", 2, "required"),
        ("train_tokenizer.py", "--input {w}/all.jsonl --vocab-size 100 --output {w}/x", 3, "no room"),
        ("train_tokenizer.py", "--input {w}/all.jsonl --vocab-size 300 --output {w}/tok", 3, "exists already"),
        ("merge_datasets.py", "--input {w}/none --output-prefix {w}/x", 3, "no corpus at"),
        ("inspect_dataset.py", "{w}/none", 3, "no corpus at"),
        ("inspect_dataset.py", "{w}/all_text_document --document 120", 3, "0 to 119"),
    ],
)
def test_mistakes_end_with_a_paragraph_and_an_exit_code(
    work: Path, name: str, arguments: str, code: int, message: str
) -> None:
    done = tool(name, *arguments.format(w=work).split())
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(work.glob("x*"))


@pytest.mark.parametrize(
    "name", ["preprocess_data.py", "train_tokenizer.py", "inspect_dataset.py", "merge_datasets.py"]
)
def test_help_needs_no_torch(name: str) -> None:
    code = (
        f"import runpy, sys; sys.argv = [{name!r}, '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'tools' / name)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    # numpy and argparse take some 0.15 s; torch alone would take more than this on any machine that tests run on.
    assert time.perf_counter() - started < 5

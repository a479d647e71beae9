"""The data tools as their users run them: real command lines, real files, exit codes."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megalm.data.preprocess_flags import FOREIGN_FLAGS, ForeignFlag, add_foreign_flags, notices
from megalm.errors import ConfigError
from megalm.tokenizers.huggingface import HuggingFaceTokenizer
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


def test_text_is_not_decoded_with_another_tokenizer(work: Path) -> None:
    other = work / "other_tok"
    succeeds("train_tokenizer.py", "--input", work / "one.jsonl", "--vocab-size", 300, "--output", other)
    done = tool("inspect_dataset.py", work / "all_text_document", "--document", 7, "--tokenizer-name-or-path", other)
    assert done.returncode == 3
    assert "which makes other ids of the same text than PretrainedFromHF" in done.stderr


def test_a_tokenizer_is_not_trained_on_empty_texts(work: Path, tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    done = tool(
        "train_tokenizer.py", "--input", tmp_path / "blank.jsonl", "--vocab-size", 300, "--output", tmp_path / "t"
    )
    assert done.returncode == 3
    assert "no text to train a tokenizer on" in done.stderr


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


FLAGS_OF_OTHER_TOOLS = {
    "BigScience, preprocess_data.py and preprocess_data_many_cores.py": """
        --input --datasets --json-keys --content-keys --split-sentences --keep-newlines --tokenizer-type --vocab-file
        --merge-file --append-eod --tokenizer-name-or-path --make-vocab-size-divisible-by --pad-vocab-size-to
        --output-prefix --dataset-impl --workers --log-interval""",
    "Megatron-LM, preprocess_data.py": """
        --input --json-keys --split-sentences --keep-newlines --append-eod --lang --output-prefix --workers
        --find-optimal-num-workers --workers-to-check --max-documents --performance-dir --partitions --log-interval
        --keep-sequential-samples --chunk-size""",
    "Megatron-LM, tokenizer arguments": """
        --vocab-size --padded-vocab-size --vocab-file --merge-file --vocab-extra-ids --tokenizer-type --tokenizer-model
        --tokenizer-metadata --tiktoken-pattern --tiktoken-num-special-tokens --tiktoken-special-tokens
        --legacy-tokenizer --trust-remote-code --special-tokens --tokenizer-special-tokens --tokenizer-hf-no-use-fast
        --tokenizer-hf-no-include-special-tokens --tokenizer-sentencepiece-legacy --sft-tokenizer-prompt-format""",
}
MERGE_FLAGS = "--datasets --output-prefix --input --multimodal"


def test_every_flag_of_other_tokenization_tools_is_known() -> None:
    for name, flags in {
        **dict.fromkeys(FLAGS_OF_OTHER_TOOLS.values(), "preprocess_data.py"),
        MERGE_FLAGS: "merge_datasets.py",
    }.items():
        parser = runpy.run_path(str(ROOT / "tools" / flags))["parser"]()
        known = {option for action in parser._actions for option in action.option_strings}
        assert set(name.split()) <= known


@pytest.mark.parametrize("flag", FOREIGN_FLAGS, ids=lambda flag: flag.name)
def test_flag_without_a_meaning_here_says_so_or_what_to_do(flag: ForeignFlag) -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("--dataset-impl", "mmap"), ("--partitions", 1), ("--partition", None)):
        parser.add_argument(name, default=default)
    add_foreign_flags(parser)
    options = parser.parse_args([flag.name, *(["7"] if flag.takes else [])])
    if flag.refused:
        with pytest.raises(ConfigError, match=f"{flag.name} cannot be obeyed\n  {re.escape(flag.reason)}"):
            list(notices(options))
    else:
        assert list(notices(options)) == [f"{flag.name} changes nothing: {flag.reason}"]
    assert list(notices(parser.parse_args([]))) == []


def test_command_lines_of_other_trainers_give_the_same_corpus(work: Path) -> None:
    bigscience = [
        *("--input", work / "one.jsonl", "--content-keys", "text", "--tokenizer-type", "PretrainedFromHf"),
        *("--tokenizer-name-or-path", work / "tok", "--output-prefix", work / "spelled", "--dataset-impl", "mmap"),
        *("--append-eod", "--workers", 1, "--log-interval", 10, "--make-vocab-size-divisible-by", 128),
    ]
    said = succeeds("preprocess_data.py", *bigscience)
    assert re.search(r"\d+ % \| .* MB/s \| .* documents/s \| .* ETA 0:00", said)
    megatron = [
        *("--input", work / "one.jsonl", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", work / "tok"),
        *("--output-prefix", work / "megatron", "--append-eod", "--workers", 2, "--partitions", 2),
        "--keep-sequential-samples",
    ]
    said = succeeds("preprocess_data.py", *megatron)
    assert "--partitions 2 without --partition: all of them here" in said
    assert "--keep-sequential-samples changes nothing" in said
    for suffix in (".bin", ".idx"):
        plain = Path(f"{work}/one_text_document{suffix}").read_bytes()
        assert Path(f"{work}/spelled_text_document{suffix}").read_bytes() == plain
        assert Path(f"{work}/megatron_text_document{suffix}").read_bytes() == plain


def test_padded_vocabulary_decides_the_width_of_ids(work: Path) -> None:
    source = ["--input", work / "one.jsonl", "--tokenizer-name-or-path", work / "tok"]
    succeeds("preprocess_data.py", *source, "--output-prefix", work / "wide", "--pad-vocab-size-to", 65_536)
    sidecar = json.loads((work / "wide_text_document.meta.json").read_text())
    assert sidecar["dtype"] == "int32"
    done = tool("preprocess_data.py", *source, "--output-prefix", work / "small", "--padded-vocab-size", 100)
    assert done.returncode == 2
    assert "--padded-vocab-size 100 is less than the tokenizer's 400 ids" in done.stderr


def test_resuming_a_whole_output_is_done_or_refused(work: Path) -> None:
    source = ["--input", work / "one.jsonl", "--tokenizer-name-or-path", work / "tok", "--output-prefix", work / "one"]
    said = succeeds("preprocess_data.py", *source, "--append-eod", "--workers", 1, "--resume")
    assert "one_text_document.bin is already complete, of the same sources and settings" in said
    done = tool("preprocess_data.py", *source, "--resume")
    assert done.returncode == 3
    assert "one_text_document is whole, and was made with other append_eod" in done.stderr


def test_partitions_of_a_folder_merge_to_the_corpus_of_one_machine(work: Path, tmp_path: Path) -> None:
    for index in (2, 0, 1):
        succeeds(
            "preprocess_data.py",
            *("--input", work / "all.jsonl", "--tokenizer-name-or-path", work / "tok", "--append-eod"),
            *("--output-prefix", tmp_path / "parts" / "all", "--partitions", 3, "--partition", index),
        )
    succeeds("merge_datasets.py", "--input", tmp_path / "parts", "--output-prefix", tmp_path / "merged")
    for suffix in (".bin", ".idx"):
        merged = Path(f"{tmp_path}/merged{suffix}").read_bytes()
        assert merged == Path(f"{work}/all_text_document{suffix}").read_bytes()
    sidecar = json.loads((tmp_path / "merged.meta.json").read_text())
    assert [part["flags"]["partition"] for part in sidecar["merged"]] == [0, 1, 2]
    assert [source["to_byte"] - source["from_byte"] for source in sidecar["sources"]] == [
        *(len(b"".join(lines)) for lines in thirds((work / "all.jsonl").read_bytes()))
    ]
    (tmp_path / "parts" / "all_1_text_document.idx").unlink()
    done = tool("merge_datasets.py", "--input", tmp_path / "parts", "--output-prefix", tmp_path / "again")
    assert done.returncode == 3
    assert "all_1_text_document.idx missing" in done.stderr


def thirds(content: bytes) -> list[list[bytes]]:
    """Lines by the third of the bytes in which they start."""
    parts: list[list[bytes]] = [[], [], []]
    at = 0
    for line in content.splitlines(keepends=True):
        parts[next(i for i in (2, 1, 0) if at >= len(content) * i // 3)].append(line)
        at += len(line)
    return parts


def test_every_kind_of_input_gives_the_same_corpus(work: Path, tmp_path: Path) -> None:
    raw = (work / "all.jsonl").read_bytes()
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(raw))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=50)
    for name in ("a.json.gz", "a.jsonl.zst", "a.parquet"):
        preprocess(work, f"of_{name}", tmp_path / name)
        for suffix in (".bin", ".idx"):
            found = Path(f"{work}/of_{name}_text_document{suffix}").read_bytes()
            assert found == Path(f"{work}/all_text_document{suffix}").read_bytes()


def test_sentences_become_sequences(work: Path) -> None:
    source = work / "prose.jsonl"
    source.write_text(json.dumps({"text": "Dr. A came.\nShe saw. "}) + "\n")
    arguments = ["--input", source, "--tokenizer-name-or-path", work / "tok", "--split-sentences"]
    succeeds("preprocess_data.py", *arguments, "--output-prefix", work / "prose", "--sentence-splitter", "rules")
    documents = read_by_description(work / "prose_text_sentence")
    tokenizer = HuggingFaceTokenizer(work / "tok")
    assert [[tokenizer.decode(ids) for ids in document] for document in documents] == [["Dr. A came.", "She saw."]]
    sidecar = json.loads((work / "prose_text_sentence.meta.json").read_text())
    assert sidecar["sentences"]["splitter"] == "rules"
    assert (sidecar["documents"], sidecar["sequences"]) == (1, 2)


def test_sidecar_records_sources_tokenizer_flags_counts_and_seconds(work: Path) -> None:
    sidecar = json.loads((work / "all_text_document.meta.json").read_text())
    raw = (work / "all.jsonl").read_bytes()
    assert sidecar["sources"] == [
        {"path": str(work / "all.jsonl"), "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    ]
    assert sidecar["tokenizer"]["digest"] == HuggingFaceTokenizer(work / "tok").digest
    documents = read_by_description(work / "all_text_document")
    assert (sidecar["documents"], sidecar["tokens"]) == (120, sum(len(ids) for (ids,) in documents))
    assert 0 < sidecar["seconds"] < 120
    parser = runpy.run_path(str(ROOT / "tools" / "preprocess_data.py"))["parser"]()
    flags = vars(parser.parse_args(["--input", str(work / "all.jsonl"), "--output-prefix", str(work / "all")]))
    flags |= {"tokenizer_name_or_path": str(work / "tok"), "append_eod": True, "workers": 2}
    assert sidecar["flags"] == {name: value for name, value in flags.items() if value is not None}


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
        (
            "preprocess_data.py",
            "--input {w}/all.jsonl --output-prefix {w}/x --tokenizer-model {w}/tok --dataset-impl lazy",
            2,
            "pass mmap",
        ),
        (
            "preprocess_data.py",
            "--input {w}/all.jsonl --output-prefix {w}/x --tokenizer-type BertWordPieceCase",
            2,
            "holds BERT's tokenizer.json",
        ),
        (
            "preprocess_data.py",
            "--input {w}/all.jsonl --output-prefix {w}/x --tokenizer-model {w}/tok --keep-newlines",
            2,
            "pass --split-sentences too",
        ),
        (
            "preprocess_data.py",
            "--input {w}/all.jsonl --output-prefix {w}/x --tokenizer-model {w}/tok --partitions 3 --partition 3",
            3,
            "partition 3 of 3 does not exist",
        ),
        (
            "preprocess_data.py",
            "--input {w}/all.jsonl --output-prefix {w}/x --tokenizer-model {w}/tok --vocab-extra-ids 100",
            2,
            "add them to the tokenizer's files",
        ),
        ("merge_datasets.py", "--input {w}/tok --output-prefix {w}/x", 3, "holds no corpus"),
        ("merge_datasets.py", "--input {w} --output-prefix {w}/x --multimodal", 3, "--multimodal"),
        ("train_tokenizer.py", "--input {w}/all.jsonl --vocab-size 100 --output {w}/x", 3, "no room"),
        ("train_tokenizer.py", "--input {w}/all.jsonl --vocab-size 300 --output {w}/tok", 3, "exists already"),
        ("merge_datasets.py", "--input {w}/none --output-prefix {w}/x", 3, "no corpus at"),
        ("inspect_dataset.py", "{w}/none", 3, "no corpus at"),
        ("gather_corpus.py", "--output {w}/x --folder {w}/none", 3, "none is not a folder"),
        ("inspect_dataset.py", "{w}/all_text_document --document 120", 3, "0 to 119"),
        (
            "train_tokenizer.py",
            "--input {w}/all.jsonl --vocab-size 300 --output {w}/x --min-frequency -1",
            3,
            "negative",
        ),
        (
            "train_tokenizer.py",
            "--input {w}/all.jsonl --vocab-size 300 --output {w}/x --max-documents -1",
            2,
            "at least 1",
        ),
        (
            "train_tokenizer.py",
            "--input {w}/all.jsonl --vocab-size 300 --output {w}/x --end-of-text a",
            3,
            "text holds",
        ),
        ("gather_corpus.py", "--output {w}/x.jsonl --target-mb nan", 2, "--target-mb nan must be greater than 0"),
        ("gather_corpus.py", "--output {w}/x.jsonl --min-mb -2", 2, "--min-mb -2.0 must be greater than 0"),
        ("write_flags_doc.py", "{w}/all.jsonl/x.md", 2, "cannot be written: "),
        ("verify_dataset.py", "{w}/all_text_document --vocab-size 0", 2, "--vocab-size 0 must be at least 1"),
        (
            "preprocess_data.py",
            "--input {w}/all.jsonl --output-prefix {w}/x --tokenizer-model {w}/tok --json-keys text text",
            2,
            "names 'text' twice",
        ),
        (
            "preprocess_data.py",
            "--input {w}/all.jsonl --output-prefix {w}/x --tokenizer-model {w}/tok --json-keys a/b",
            2,
            "'a/b' cannot be part of a file's name",
        ),
        (
            "preprocess_data.py",
            "--input {w}/all.jsonl --output-prefix {w}/x --tokenizer-model {w}/tok --log-interval 0",
            2,
            "--log-interval 0 must be at least 1",
        ),
        (
            "preprocess_data.py",
            "--input {w}/all.jsonl --output-prefix {w}/x --tokenizer-model {w}/tok --workers 1025",
            2,
            "--workers 1025 must be at most 1,024",
        ),
        ("inspect_dataset.py", "{w}/all_text_document --samples -1", 2, "--samples -1 must not be negative"),
        ("inspect_dataset.py", "{w}/all_text_document --max-tokens -5", 2, "--max-tokens -5 must not be negative"),
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

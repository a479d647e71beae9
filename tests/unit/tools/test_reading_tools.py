"""The tools that look at corpora and sample maps, called as their users call them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from megalm.data.indexed import sidecar_path
from megalm.errors import ConfigError
from tests.support.tiny_run import MODEL_FLAGS, TRAINING_FLAGS, write_corpus
from tests.support.token_files import write_by_description
from tests.support.tokenizer_folder import write_tokenizer

ROOT = Path(__file__).resolve().parents[3]


def tool(name: str, *arguments: object) -> int:
    code: int = runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="tool")["main"](list(map(str, arguments)))
    return code


def test_verification_says_whether_hashes_prove_the_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proved = write_corpus(tmp_path)
    write_by_description(tmp_path / "bare", [[[1, 2]]])
    assert tool("verify_dataset", proved, tmp_path / "bare", tmp_path / "none") == 3
    said = capsys.readouterr()
    first, second = said.out.splitlines()
    assert "whole; 200 documents" in first
    assert "both files have their sha256" in first
    assert "no bare.meta.json beside it, so that a changed token cannot be told from a right one" in second
    assert "no corpus at" in said.err


def test_inspection_shows_a_picture_and_documents_of_several_sequences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_by_description(tmp_path / "c", [[[1, 2], [3]], [[4] * 20], [[5] * 18]])
    assert tool("inspect_dataset", tmp_path / "c", "--document", 0, "--read-tokens") == 0
    said = capsys.readouterr().out.splitlines()
    assert "3 documents, 4 sequences, 41 tokens" in said[0]
    assert said[1] == "ids are uint16, the largest is 5"
    picture = [line for line in said if "█" in line]
    assert [line.split()[:2] for line in picture] == [["2-3", "1"], ["16-31", "2"]]
    assert said[-2:] == ["--- document 0: 3 tokens in 2 sequences", "1 2 3"]


def test_maps_that_are_built_before_are_those_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data-path", write_corpus(tmp_path), "--data-cache-path", str(tmp_path / "maps")]
    command_line = [*MODEL_FLAGS, *TRAINING_FLAGS, *flags]
    assert tool("build_index", "--", *command_line) == 0
    built = sorted(path.name for path in (tmp_path / "maps").iterdir() if path.is_dir())
    assert len(built) == 1
    assert "train: 160 samples of 16 tokens from" in capsys.readouterr().out
    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / "maps").rglob("*.npy"))]
    assert tool("trace_samples", "--steps", 1, "--no-text", "--", *command_line) == 0
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "maps").rglob("*.npy"))] == stamps
    assert "sample 7 of step 1" in capsys.readouterr().out


def test_tracing_shows_document_offset_and_text_of_every_piece(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_by_description(tmp_path / "c", [[[10 * i + j for j in range(6)]] for i in range(9)])
    command_line = [*MODEL_FLAGS, *TRAINING_FLAGS, "--data-path", str(tmp_path / "c"), "--split", "1,0,0"]
    assert tool("trace_samples", "--samples", "0:1", "--", *command_line) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("sample")] == ["sample 0", "sample 1"]
    shown = 0
    for where, text in zip(said, said[1:], strict=False):
        if "document" in where:
            document, offset = (int(where.split(word)[1].split(",")[0]) for word in ("document ", "from token "))
            ids = [int(word) for word in text.split()]
            assert ids == list(range(10 * document + offset, 10 * document + offset + len(ids)))
            shown += len(ids)
    assert shown == 2 * 17


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps 0 must fit 1 <= FIRST"),
        (["--steps", "5:3"], "must fit"),
        (["--steps", "21"], "goes past the last step of this run, 20"),
        (["--samples", "0", "--max-tokens", "-1"], "--max-tokens -1 must not be negative"),
        (["--samples", "x"], "neither a number nor"),
        (["--samples", "0", "--data-parallel-size", "0"], "--data-parallel-size 0 must be at least 1"),
        (["--samples", "159:160"], "--samples 159:160: sample 160 does not exist; the run reads 0 to 159"),
        (["--samples", "999999"], "sample 999999 does not exist"),
        (["--steps", "1", "--metrics-path", "none.jsonl"], "there is no metrics file"),
    ],
)
def test_ranges_that_do_not_exist_are_named(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command_line = [*MODEL_FLAGS, *TRAINING_FLAGS, "--data-path", write_corpus(tmp_path)]
    assert tool("trace_samples", *arguments, "--no-text", "--", *command_line) != 0
    assert message in capsys.readouterr().err


def test_tracing_decodes_with_no_other_tokenizer_than_the_corpus_was_made_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    prefix = write_corpus(tmp_path)
    sidecar = sidecar_path(prefix)
    made_with = {"type": "PretrainedFromHF", "digest": "another", "vocab_size": 257, "probe": [1, 2, 3]}
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "tokenizer": made_with}))
    tokenizer = ["--tokenizer-type", "PretrainedFromHF", "--tokenizer-name-or-path", str(tmp_path / "tokenizer")]
    command_line = [*MODEL_FLAGS, *TRAINING_FLAGS, "--data-path", prefix, *tokenizer, "--vocab-size", "257"]
    assert tool("trace_samples", "--samples", 0, "--", *command_line) == 3
    assert "makes other ids of the same text" in capsys.readouterr().err
    assert tool("trace_samples", "--samples", 0, "--no-text", "--", *command_line) == 0


def test_figures_that_cannot_be_written_are_an_answer(tmp_path: Path) -> None:
    write = runpy.run_path(str(ROOT / "tools" / "summarise_run.py"), run_name="tool")["write_figures"]
    with pytest.raises(ConfigError, match="the figures .*none/x.json cannot be written: No such file or directory"):
        write(tmp_path / "none" / "x.json", {"margin": 1.0})

"""What a user can get wrong: a clear paragraph on one rank, the documented exit code on all, nothing written."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalm.topology import start
from tests.support.ranks import run_ranks
from tests.support.tiny_run import MODEL_FLAGS, TRAINING_FLAGS, write_corpus

pytestmark = pytest.mark.dist

PROGRAM = str(Path(__file__).parents[2] / "pretrain_gpt.py")


def run_program(flags: list[str]) -> tuple[Any, str]:
    """The program as its launcher starts it, in this rank; exit code and what it wrote to stderr."""
    code, _, errors = run_and_hear(flags)
    return code, errors


def run_and_hear(flags: list[str]) -> tuple[Any, str, str]:
    """The same, with what it wrote to stdout before what it wrote to stderr."""
    sys.argv = [PROGRAM, *MODEL_FLAGS, *TRAINING_FLAGS, *flags]
    start.leave = sys.exit  # the program ends its process at once, which here still has to report
    said, errors = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(said):
        try:
            runpy.run_path(PROGRAM, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    return code, said.getvalue(), errors.getvalue()


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder` with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def fail(folder: Path, flags: list[str], *, code: int, world_size: int = 2, befalls_each: bool = False) -> str:
    """Run on all ranks, expect `code` from each and words from the first alone, unless it befalls each by itself;
    returns the words."""
    before = snapshot(folder)
    outcomes = run_ranks(run_program, world_size, flags, timeout=60.0)
    assert [outcome[0] for outcome in outcomes] == [code] * world_size, outcomes
    first, *others = (text for _, text in outcomes)
    assert "Traceback" not in first
    assert not any("Traceback" in text if befalls_each else "Error:" in text for text in others), others
    assert snapshot(folder) == before
    return first


def corrupted(prefix: str, change: Callable[[bytes], bytes]) -> str:
    """The corpus with its index changed."""
    index = Path(prefix + ".idx")
    index.write_bytes(change(index.read_bytes()))
    return prefix


def test_a_layout_that_does_not_fit_the_processes_names_those_that_do(tmp_path: Path) -> None:
    said = fail(tmp_path, ["--data-path", write_corpus(tmp_path), "--tensor-model-parallel-size", "4"], code=2)
    assert "parallel.tp" in said
    assert "--tensor-model-parallel-size" in said


def test_every_wrong_number_is_in_one_error(tmp_path: Path) -> None:
    flags = ["--tensor-model-parallel-size", "2", "--micro-batch-size", "3", "--lr", "-1", "model.num_heads=5"]
    said = fail(tmp_path, ["--data-path", write_corpus(tmp_path), *flags], code=2)
    for path in ("training.lr", "model.num_heads"):
        assert path in said, said


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    said = fail(tmp_path, ["--data-path", str(tmp_path / "absent")], code=3)
    assert "absent.idx" in said or "absent.bin" in said


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda index: b"X" + index[1:], "MMIDIDX"),
        (lambda index: index[:-9], "bytes"),
        (lambda index: index[:17] + b"\x63" + index[18:], "dtype"),
    ],
    ids=["magic", "truncated", "dtype"],
)
def test_a_corrupt_index_is_named_with_the_rule_it_breaks(
    change: Callable[[bytes], bytes], word: str, tmp_path: Path
) -> None:
    said = fail(tmp_path, ["--data-path", corrupted(write_corpus(tmp_path), change)], code=3)
    assert ".idx" in said
    assert word in said


def test_an_absent_checkpoint_stops_the_run_and_does_not_start_it_afresh(tmp_path: Path) -> None:
    flags = ["--data-path", write_corpus(tmp_path), "--data-cache-path", str(tmp_path)]
    run_ranks(run_program, 1, [*flags, "--exit-interval", "1"])  # the sample maps are there from now on
    said = fail(tmp_path, [*flags, "--load", str(tmp_path / "nothing"), "--exit-interval", "1"], code=5)
    assert "nothing" in said
    assert "--allow-fresh-start" in said


def test_an_unwritable_output_stops_the_run_before_it_trains(tmp_path: Path) -> None:
    obstacle = tmp_path / "file"
    obstacle.write_text("here first")
    flags = ["--data-path", write_corpus(tmp_path), "--data-cache-path", str(tmp_path)]
    run_ranks(run_program, 1, [*flags, "--exit-interval", "1"])
    said = fail(tmp_path, [*flags, "--save", str(obstacle / "run")], code=2)
    assert "file" in said


def test_a_vocabulary_that_does_not_divide_names_what_would(tmp_path: Path) -> None:
    flags = ["--data-path", write_corpus(tmp_path), "--tensor-model-parallel-size", "2"]
    said = fail(tmp_path, [*flags, "--pad-vocab-size-to", "97"], code=2)
    assert "97" in said
    assert "parallel.tp" in said


def test_ids_beyond_the_vocabulary_of_the_model_are_refused(tmp_path: Path) -> None:
    folder, cache = tmp_path / "corpus", tmp_path / "cache"
    folder.mkdir()
    flags = ["--data-path", write_corpus(folder), "--data-cache-path", str(cache)]
    vocabulary = ["--vocab-size", "20", "--make-vocab-size-divisible-by", "2"]
    said = fail(folder, [*flags, *vocabulary], code=3, befalls_each=True)
    assert "vocab" in said


def test_a_tokenizer_larger_than_the_corpus_dtype_is_refused(tmp_path: Path) -> None:
    said = fail(tmp_path, ["--data-path", write_corpus(tmp_path), "--vocab-size", "70000"], code=3)
    assert "uint16" in said
    assert "70,001" in said


def test_without_a_corpus_the_remedy_is_a_flag(tmp_path: Path) -> None:
    assert "--data-path" in fail(tmp_path, [], code=2)


def _corpus_on_the_first_rank_only(prefix: str) -> tuple[Any, str]:
    own = prefix if os.environ["RANK"] == "0" else prefix + ".elsewhere"
    return run_program(["--data-path", own])


@pytest.mark.parametrize(
    "content, named", [('{"zero_optimization": {"bogus": 1}}', "bogus"), ('{"communication_data_type": "u8"}', "u8")]
)
def test_a_key_that_deepspeed_does_not_take_is_named(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text(content)
    flags = ["--data-path", write_corpus(tmp_path), "--deepspeed_config", str(path)]
    # The corpus is open by then, and its sample maps are written beside it.
    (code, said), (_, others) = run_ranks(run_program, 2, flags, timeout=60.0)
    assert code == 2
    assert "DeepSpeed does not take its configuration" in said
    assert named in said
    assert "Traceback" not in said + others


def test_keys_that_deepspeed_cannot_set_up_are_named(tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": true}')
    flags = ["--data-path", write_corpus(tmp_path), "--zero-stage", "2", "--deepspeed_config", str(path)]
    (code, said), (_, others) = run_ranks(run_program, 2, flags, timeout=60.0)
    assert code == 2
    assert "DeepSpeed cannot set up its engine: ZeRORuntimeException: " in said
    assert "zero_optimization.offload_optimizer.device, zero_force_ds_cpu_optimizer" in said
    assert "Traceback" not in said + others


def test_what_fails_on_another_rank_alone_stops_all_with_its_words(tmp_path: Path) -> None:
    outcomes = run_ranks(_corpus_on_the_first_rank_only, 2, write_corpus(tmp_path), timeout=60.0)
    assert [code for code, _ in outcomes] == [3, 3]
    assert "elsewhere" in outcomes[0][1]

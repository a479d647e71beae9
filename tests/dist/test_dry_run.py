"""`--dry-run` finds what the run would stop at, writes nothing, and speaks once; other ways not to train."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megalm.data.folder_lock import folder_lock
from megalm.train.continuing import LOCK
from megalm.train.engine import OLDEST_DEEPSPEED
from tests.dist.test_bad_input import run_and_hear, run_program, snapshot
from tests.support.jobs import ROOT
from tests.support.ranks import run_ranks
from tests.support.tiny_run import train_tiny, write_corpus

pytestmark = pytest.mark.dist

Outcome = tuple[Any, str]


def run_each(lines: dict[str, list[str]]) -> dict[str, Outcome]:
    """Exit code and errors of the program for each command line, one after the other in this process."""
    return {name: run_program(flags) for name, flags in lines.items()}


def test_what_the_run_would_stop_at_is_found_and_nothing_is_written(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"bogus": 1}}))
    data = ["--data-path", write_corpus(corpus)]
    run_ranks(train_tiny, 1, [*data, "--train-iters", "5", "--save", str(tmp_path / "run")])
    load = ["--load", str(tmp_path / "run"), "--dry-run"]
    before = snapshot(tmp_path)
    (outcomes,) = run_ranks(
        run_each,
        1,
        {
            "right": [*data, *load, "--train-iters", "5", "--save", str(tmp_path / "new" / "run")],
            "corpus": ["--data-path", str(corpus / "absent"), "--dry-run"],
            "tokenizer": [*data, "--vocab-size", "70000", "--dry-run"],
            "absent": [*data, "--load", str(tmp_path / "nothing"), "--dry-run"],
            "fresh": [*data, "--load", str(tmp_path / "nothing"), "--allow-fresh-start", "--dry-run"],
            "schedule": [*data, *load, "--train-iters", "5", "--lr", "5e-3"],
            "save": [*data, "--save", str(tmp_path / "file" / "run"), "--dry-run"],
            "another's": [*data, "--save", str(tmp_path / "run"), "--dry-run"],
            "over another's": [*data, "--save", str(tmp_path / "run")],
            "deepspeed": [*data, "--deepspeed_config", str(tmp_path / "deepspeed.json"), "--dry-run"],
        },
    )
    assert snapshot(tmp_path) == before
    codes = {name: code for name, (code, _) in outcomes.items()}
    assert codes == {
        "right": 0, "corpus": 3, "tokenizer": 3, "absent": 5, "fresh": 0, "schedule": 2, "save": 5, "another's": 5, "over another's": 5,
        "deepspeed": 2,
    }  # fmt: skip
    assert "would not follow the schedule" in outcomes["schedule"][1]
    assert "cannot be written" in outcomes["save"][1]
    assert "bogus" in outcomes["deepspeed"][1]


def test_the_plan_is_printed_once(tmp_path: Path) -> None:
    flags = ["--data-path", write_corpus(tmp_path), "--dry-run", "--pipeline-model-parallel-size", "2"]
    (first, report, _), second = run_ranks(run_and_hear, 2, flags)
    assert first == 0
    assert second == (0, "", "")
    assert report.startswith("dry run: every check passed")
    assert "corpora     1, with" in report


def test_replicas_and_their_stages_of_zero_have_a_plan(tmp_path: Path) -> None:
    data = ["--data-path", write_corpus(tmp_path), "--dry-run"]
    (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"bogus": 1}}))
    lines = {
        "fp32": data,
        "bf16": [*data, "--bf16"],
        "ZeRO-2": [*data, "--zero-stage", "2"],
        "bogus": [*data, "--deepspeed_config", str(tmp_path / "deepspeed.json")],
    }
    outcomes = run_ranks(run_each, 2, lines)[0]  # the first rank looks for all
    assert {name: code for name, (code, _) in outcomes.items()} == {"fp32": 0, "bf16": 0, "ZeRO-2": 0, "bogus": 2}


def test_a_checkpoint_is_evaluated_whatever_schedule_it_was_trained_with(tmp_path: Path) -> None:
    data = ["--data-path", write_corpus(tmp_path), "--split", "80,10,10"]
    outcomes = run_ranks(
        run_each,
        1,
        {
            "train": [*data, "--train-iters", "5", "--save", str(tmp_path / "run")],
            "evaluate": [*data, "--train-iters", "5", "--load", str(tmp_path / "run"), "--eval-only", "--lr", "5e-3"],
        },
    )
    assert outcomes[0] == {"train": (0, ""), "evaluate": (0, "")}


def test_a_step_that_is_in_the_folder_is_not_written_again(tmp_path: Path) -> None:
    data = ["--data-path", write_corpus(tmp_path), "--train-iters", "5"]
    save = ["--save", str(tmp_path / "run")]
    load = ["--load", str(tmp_path / "run" / "global_step5"), "--save", f"{tmp_path}/./run/"]
    run_ranks(run_each, 1, {"train": [*data, *save]})
    before = (tmp_path / "run" / "global_step5").stat()
    (outcomes,) = run_ranks(run_each, 1, {"again": [*data, *load]})
    assert outcomes == {"again": (0, "")}
    after = (tmp_path / "run" / "global_step5").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_kill_switch_that_is_there_already_stops_before_the_first_step(tmp_path: Path) -> None:
    data = ["--data-path", write_corpus(tmp_path)]
    (tmp_path / "stop").touch()
    flags = [*data, "--kill-switch-path", str(tmp_path / "stop"), "--save", str(tmp_path / "run")]
    (outcome,) = run_ranks(train_tiny, 1, flags)
    assert outcome.losses == []
    assert not list((tmp_path / "run").glob("global_step*"))


def _memory_runs_out(flags: list[str]) -> Outcome:
    with mock.patch("megalm.train.loop.step", side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried ...")):
        return run_program(flags)


def test_memory_that_is_used_up_is_said_with_what_needs_less(tmp_path: Path) -> None:
    code, said = run_ranks(_memory_runs_out, 1, ["--data-path", write_corpus(tmp_path)])[0]
    assert code == 6
    assert "DeviceMemoryError: the memory of rank 0's GPU is used up: CUDA out of memory. Tried" in said
    assert "training.micro_batch_size = 2" in said
    assert "Traceback" not in said


def _beside_another_run(flags: list[str], folder: str) -> Outcome:
    with folder_lock(Path(folder), name=LOCK) as is_held, mock.patch("megalm.train.continuing.PATIENCE_SECONDS", 0.1):
        assert is_held
        return run_program([*flags, "--save", folder])


def test_two_runs_do_not_save_to_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    data = ["--data-path", write_corpus(tmp_path)]
    code, said = run_ranks(_beside_another_run, 1, data, str(folder))[0]
    assert code == 5
    assert f"another run is saving to {folder}" in said
    assert sorted(path.name for path in folder.iterdir()) == [LOCK]


def test_sample_maps_may_lie_in_the_folder_that_is_saved_to(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    data = ["--data-path", write_corpus(tmp_path), "--train-iters", "5", "--data-cache-path", folder]
    (outcome,) = run_ranks(train_tiny, 1, [*data, "--save", folder], timeout=60)
    assert len(outcome.losses) == 5


def _without_host_memory(flags: list[str]) -> Outcome:
    told = RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                        "to allocate 800000000000 bytes. Error code 12 (Cannot allocate memory)")  # fmt: skip
    with mock.patch("megalm.train.engine.PipelineTrainingEngine._forward_backward_update", side_effect=told):
        return run_program(flags)


def test_memory_of_the_host_that_is_used_up_is_said_with_what_needs_less(tmp_path: Path) -> None:
    code, said = run_ranks(_without_host_memory, 1, ["--data-path", write_corpus(tmp_path)])[0]
    assert code == 6
    assert "the memory of rank 0's host is used up" in said
    assert "Traceback" not in said


def _with_an_older_deepspeed(flags: list[str]) -> Outcome:
    with mock.patch("deepspeed.__version__", "0.19.7+cpu"):
        return run_program(flags)


def test_a_deepspeed_that_trains_another_model_is_refused(tmp_path: Path) -> None:
    code, said = run_ranks(_with_an_older_deepspeed, 1, ["--data-path", write_corpus(tmp_path)])[0]
    assert code == 2
    assert "DeepSpeed 0.19.7+cpu is older than 0.19.8" in said
    assert f'"deepspeed>={OLDEST_DEEPSPEED}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def _interrupted(flags: list[str]) -> Outcome:
    with mock.patch("megalm.train.build.build", side_effect=KeyboardInterrupt):
        return run_program(flags)


def test_ctrl_c_while_starting_is_one_line(tmp_path: Path) -> None:
    outcome = run_ranks(_interrupted, 1, ["--data-path", write_corpus(tmp_path)])[0]
    assert outcome == (130, "\ninterrupted, not while training\n")


def test_a_pattern_of_layers_that_matches_too_few_is_refused(tmp_path: Path) -> None:
    data = ["--data-path", write_corpus(tmp_path)]
    patterns = {name: [*data, "--pp-partition-method", f"type:{name}"] for name in ("attention", "norm")}
    (outcomes,) = run_ranks(run_each, 1, patterns)
    assert outcomes["norm"][0] == 0
    code, said = outcomes["attention"]
    assert code == 2
    assert "matches 0 layers and must match one for each stage, of which there are 1" in said


def test_what_no_stage_or_processor_can_take_is_found(tmp_path: Path) -> None:
    data = ["--data-path", write_corpus(tmp_path), "--dry-run", "--pipeline-model-parallel-size", "3", "--num-layers", "3"]
    patterns = {"head": "type:unchanged", "embedding": "type:sequence_first|embeddingpipe|layernorm"}
    lines = {name: [*data, "--pp-partition-method", pattern] for name, pattern in patterns.items()}
    lines["kernel"] = [*data, "--attention-kernel", "triton"]
    lines["update"] = [*data, "--adamw-kernel", "triton", "--bf16"]
    lines["update in fp32"] = [*data, "--adamw-kernel", "triton"]
    (_, report, _), *_ = run_ranks(run_and_hear, 3, data)
    assert "stages      of 4, 1, 5 layers" in report, report
    outcomes = run_ranks(run_each, 3, lines)[0]
    codes = {name: code for name, (code, _) in outcomes.items()}
    assert codes == {"head": 2, "embedding": 2, "kernel": 4, "update": 4, "update in fp32": 2}
    assert "output.adamw = 'triton' cannot run on cpu" in outcomes["update"][1]
    assert "leaves the last stage without the head: 3 stages of" in outcomes["head"][1]
    assert "leaves the first stage without the embedding" in outcomes["embedding"][1]
    assert "'triton' cannot run on cpu" in outcomes["kernel"][1]


def _logged(flags: list[str]) -> tuple[list[str], str]:
    """What DeepSpeed logs and what is printed."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("DeepSpeed").addHandler(handler)
    _, said, _ = run_and_hear(flags)
    return lines, said


def test_deepspeeds_instruments_are_heard_if_asked_for(tmp_path: Path) -> None:
    asked = {"wall_clock_breakdown": True, "dump_state": True}
    (tmp_path / "deepspeed.json").write_text(json.dumps(asked))
    data = ["--data-path", write_corpus(tmp_path), "--train-iters", "10", "--metrics-path", str(tmp_path / "m.jsonl")]
    logged, said = run_ranks(_logged, 1, [*data, "--deepspeed_config", str(tmp_path / "deepspeed.json")])[0]
    assert any("DeepSpeedEngine configuration" in line for line in logged)
    assert "fwd_microstep" in said
    (seconds,) = re.findall(r"steps: 10 loss: .* iter time \(s\): ([\d.]+)", said)
    ours = [json.loads(line).get("step_seconds", 0.0) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    mean = sum(ours) / 10
    assert mean > 0.0
    assert float(seconds) == pytest.approx(mean, rel=0.5)  # of the same ten steps, by two clocks; it had been a tenth
    assert run_ranks(_logged, 1, [*data, "training.train_iters=6"])[0] == ([], "")


def test_a_smaller_batch_that_would_run_out_of_samples_is_refused_at_the_start(tmp_path: Path) -> None:
    data = ["--data-path", write_corpus(tmp_path, num_documents=30), "--lr-decay-iters", "20"]
    save = ["--save", str(tmp_path / "run")]
    fewer = ["--global-batch-size", "4", "--load", str(tmp_path / "run"), "--allow-changed-sample-order"]
    (outcomes,) = run_ranks(
        run_each,
        1,
        {
            "train": [*data, *save, "--train-iters", "20", "--global-batch-size", "48", "--exit-interval", "12"],
            "go on": [*data, *fewer, "--train-iters", "20"],
        },
    )
    assert outcomes["train"] == (75, "")
    code, said = outcomes["go on"]
    assert code == 2
    assert "the run would read 608 samples, of which 576 are read already" in said


def test_a_run_of_samples_that_goes_on_with_another_batch_knows_its_end(tmp_path: Path) -> None:
    in_samples = ["training.train_iters=null", "training.lr_warmup_iters=0", "--train-samples", "96"]
    data = ["--data-path", write_corpus(tmp_path, num_documents=200), *in_samples]
    folder = str(tmp_path / "run")
    (outcomes,) = run_ranks(
        run_each,
        1,
        {
            "train": [*data, "--save", folder, "--global-batch-size", "4", "--exit-interval", "8"],
            "go on": [*data, "--load", folder, "--global-batch-size", "8", "--metrics-path", str(tmp_path / "m.jsonl")],
        },
    )
    assert outcomes["train"][0] == 75
    assert outcomes["go on"] == (0, "")
    records = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    steps = [(record["step"], record["total_steps"]) for record in records if record["kind"] == "train"]
    assert steps == [(step, 16) for step in range(9, 17)]


def _overflowing(flags: list[str]) -> Outcome:
    told = Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")
    with mock.patch("megalm.train.engine.PipelineTrainingEngine._forward_backward_update", side_effect=told):
        return run_program(flags)


def test_gradients_that_overflow_at_the_least_scale_are_said_in_a_paragraph(tmp_path: Path) -> None:
    code, said = run_ranks(_overflowing, 1, ["--data-path", write_corpus(tmp_path)])[0]
    assert code == 7
    assert "although the loss scale is at its least" in said
    assert "Traceback" not in said

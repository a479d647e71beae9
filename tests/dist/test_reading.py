"""What a run reads: told by the tracing tool, set by set, in the order of its checkpoint, document by document."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.jobs import ROOT, run_job
from tests.support.ranks import RankFailure, run_ranks
from tests.support.tiny_run import MODEL_FLAGS, TRAINING_FLAGS, VOCAB_SIZE, Collector, train_tiny, write_corpus

pytestmark = pytest.mark.dist


def corpora(folder: Path) -> tuple[str, str]:
    """Two corpora, so different that a sample tells where it comes from."""
    first, second = folder / "first", folder / "second"
    first.mkdir()
    second.mkdir()
    return write_corpus(first), write_corpus(second, num_documents=60, seed=1)


BY_SAMPLES = [
    *MODEL_FLAGS, "--micro-batch-size", "2", "--global-batch-size", "8", "--rampup-batch-size", "2", "2", "40",
    "--train-samples", "90", "--lr", "1e-2", "--eval-interval", "0", "--num-workers", "0", "--log-level", "error",
]  # fmt: skip


def _read(command_line: list[str]) -> tuple[dict[int, list[list[int]]], list[int]]:
    """The samples of every step that was trained, as token ids, and the steps that the run counted."""
    from megalm.config.parse import parse_command_line
    from megalm.train.build import running
    from megalm.train.prepare import prepare
    from megalm.train.loop import train

    with running(prepare(parse_command_line(command_line))) as run:
        collector = Collector()
        run.sinks = [*run.sinks, collector]
        by_step: dict[int, list[list[int]]] = {}
        make = run.batches_from

        def recorded(consumed: int) -> Any:
            for batch in make(consumed):
                samples = np.concatenate([batch.tokens.numpy(), batch.labels.numpy()[:, -1:]], axis=1).tolist()
                by_step.setdefault(run.state.step + 1, []).extend(samples)
                yield batch

        run.batches_from = recorded
        run.batches = recorded(run.state.consumed_samples)
        train(run)
        return by_step, [m.step for m in collector.steps]


def traced(options: list[str], command_line: list[str]) -> dict[int, list[list[int]]]:
    """The same, as tools/trace_samples.py tells it from the command line: ids of all pieces of each sample."""
    main = runpy.run_path(str(ROOT / "tools" / "trace_samples.py"), run_name="traced")["main"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main([*options, "--json", "--max-tokens", "1000", "--", *command_line]) == 0
    found: dict[int, dict[int, list[int]]] = {}
    for line in said.getvalue().splitlines():
        piece = json.loads(line)
        sample = found.setdefault(piece["step"], {}).setdefault(piece["sample"], [])
        assert len(sample) == piece["position"]
        assert len(piece["ids"]) == piece["length"]
        sample.extend(piece["ids"])
    return {step: list(samples.values()) for step, samples in found.items()}


def test_tracing_tells_what_every_step_read_through_blend_ramp_and_left_out_steps(tmp_path: Path) -> None:
    a, b = corpora(tmp_path)
    command_line = [
        *(*BY_SAMPLES, "--data-path", "0.3", a, "0.7", b, "--skip-train-iteration-range", "3-4", "11-11"),
        *("--metrics-path", str(tmp_path / "metrics.jsonl"), "--data-cache-path", str(tmp_path / "maps")),
    ]
    ((read, steps),) = run_ranks(_read, 1, command_line)
    last = max(steps)
    assert steps == [step for step in range(1, last + 1) if step not in (3, 4, 11)]
    assert {len(samples) for samples in read.values()} == {2, 4, 6, 8}, "the batch grows"
    assert list(read) == steps
    assert traced(["--steps", f"1:{last}"], command_line) == read
    assert traced(["--steps", "12"], command_line) == {12: read[12]}
    (tmp_path / "run").mkdir()
    taken_back = [{"first": 3, "last": 4, "spike": 3}, {"first": 11, "last": 11, "spike": 11}]
    (tmp_path / "run" / "roll_backs.json").write_text(json.dumps(taken_back))
    at = command_line.index("--skip-train-iteration-range")
    untold = [*command_line[:at], *command_line[at + 3 :], "--save", str(tmp_path / "run")]
    assert traced(["--steps", f"1:{last}"], untold) == read
    recorded = ["--metrics-path", str(tmp_path / "metrics.jsonl")]
    assert traced(["--steps", "2:13", *recorded], command_line) == {s: read[s] for s in read if 2 <= s <= 13}


def _train_on_own_host(folders: list[str], flags: list[str]) -> list[float]:
    """As the first process of a host that sees its own copy of the corpus and its own cache alone."""
    folder = folders[int(os.environ["RANK"])]
    os.environ["LOCAL_RANK"] = "0"
    own = ["--data-path", f"{folder}/corpus_text_document", "--data-cache-path", f"{folder}/maps", "--verify-data"]
    return train_tiny([*flags, *own]).losses


def test_hosts_that_share_no_file_system_build_their_own_maps_and_read_the_same(tmp_path: Path) -> None:
    hosts = [tmp_path / name for name in ("first", "second")]
    for host in hosts:
        host.mkdir()
        write_corpus(host)
    one = run_ranks(train_tiny, 1, ["--data-path", f"{hosts[0]}/corpus_text_document", "--train-iters", "5"])
    apart = run_ranks(_train_on_own_host, 2, [str(host) for host in hosts], ["--train-iters", "5"])
    # Sums of the same samples in another order.
    np.testing.assert_allclose(apart[0], one[0].losses, rtol=1e-5)
    for host in hosts:
        assert len([path for path in (host / "maps").iterdir() if path.is_dir()]) == 1


def test_hosts_whose_corpora_differ_are_refused_before_they_train(tmp_path: Path) -> None:
    """With stages on both, tokens of one text would be trained to be followed by those of another."""
    hosts = [tmp_path / name for name in ("first", "second")]
    for seed, host in enumerate(hosts):
        host.mkdir()
        write_corpus(host, seed=seed)
    flags = ["--train-iters", "5", "--pipeline-model-parallel-size", "2"]
    with pytest.raises(RankFailure, match="rank 1 would read other samples than rank 0: the training set") as failure:
        run_ranks(_train_on_own_host, 2, [str(host) for host in hosts], flags)
    assert str(failure.value).count("DataError: rank 1 would") == 2


def test_longer_run_that_would_read_in_another_order_is_refused_unless_asked_for(tmp_path: Path) -> None:
    a, _ = corpora(tmp_path)
    # 200 documents of 32 tokens make 400 samples, 50 steps of 8.
    flags = [
        "--data-path",
        a,
        "--split",
        "1,0,0",
        "--lr-decay-iters",
        "30",
        "--data-cache-path",
        str(tmp_path / "maps"),
    ]
    short = [*flags, "--train-iters", "4", "--exit-interval", "2", "--save", str(tmp_path / "run")]
    run_ranks(train_tiny, 1, short)
    longer = [*flags, "--load", str(tmp_path / "run"), "--exit-interval", "3", "--train-iters"]
    run_ranks(train_tiny, 1, [*longer, "30"])
    with pytest.raises(RankFailure, match=r"another order than .*\n.*train_iters: 4 in the checkpoint, 300 now"):
        run_ranks(train_tiny, 1, [*longer, "300"])
    ((outcome),) = run_ranks(train_tiny, 1, [*longer, "300", "--allow-changed-sample-order"])
    assert len(outcome.losses) == 1


def test_several_validation_sets_are_evaluated_and_logged_each_under_its_name(tmp_path: Path) -> None:
    a, b = corpora(tmp_path)
    flags = [
        *MODEL_FLAGS, *TRAINING_FLAGS,
        "--train-weighted-split-paths", f"TRAIN: 1 0:0.8 {a}, 2 0:0.8 {b}",
        "--valid-weighted-split-paths",
        f"FIRST: 1 0.8:1 {a}", f"SECOND: 1 0.95:1 {b}", f"BOTH: 1 0.8:1 {a}, 1 0.8:1 {b}",
        "--test-weighted-split-paths", f"TEST: 1 0.9:1 {a}",
        "--eval-interval", "2", "--eval-iters", "2", "--train-iters", "4", "--lr-warmup-iters", "1",
        "--num-workers", "2", "--log-level", "info",
        "--metrics-path", str(tmp_path / "metrics.jsonl"),
    ]  # fmt: skip
    end = run_job(flags, world_size=1, logs=tmp_path / "logs")
    assert end.code == 0, end.output
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {(r["step"], r["name"]): r["loss"] for r in records if r["kind"] == "valid"}
    every = ["FIRST", "SECOND", "BOTH"]
    assert list(losses) == [*((2, name) for name in every), *((4, name) for name in every), (4, "TEST")]
    assert len(set(losses.values())) == len(losses)
    assert "FIRST loss" in end.output
    assert "TRAIN: 32 samples of 16 tokens from 2 corpora" in end.output
    assert "SECOND: too small" in end.output
    assert all(0 <= r["data_seconds"] < r["step_seconds"] for r in records if r["kind"] == "train")


def test_ends_of_documents_act_alike_on_one_stage_and_two(tmp_path: Path) -> None:
    from megalm.data.indexed_writer import IndexedWriter

    with IndexedWriter(str(tmp_path / "c"), "u2") as writer:
        draw = np.random.default_rng(0)
        for _ in range(300):
            # NullTokenizer ends a document with the id after those of the vocabulary.
            writer.add_document([*draw.integers(0, VOCAB_SIZE, draw.integers(1, 9)), VOCAB_SIZE])
    flags = [
        *("--data-path", str(tmp_path / "c"), "--position-embedding-type", "absolute", "--train-iters", "4"),
        *("--init-method-std", "0.3", "--lr-warmup-iters", "1", "--data-cache-path", str(tmp_path / "maps")),
    ]
    rules = ["--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss"]
    two = ["--pipeline-model-parallel-size", "2"]
    losses = {
        name: run_ranks(train_tiny, world, [*flags, *more])[0].losses
        for name, world, more in [
            ("none", 1, []),
            *((rule, 1, [rule]) for rule in rules),
            ("all", 1, rules),
            ("all on two stages", 2, [*rules, *two]),
        ]
    }
    np.testing.assert_allclose(losses["all on two stages"], losses["all"], rtol=1e-5)
    firsts = [values[0] for name, values in losses.items() if name != "all on two stages"]
    assert min(abs(x - y) for i, x in enumerate(firsts) for y in firsts[:i]) > 1e-3, "each flag changes the loss"

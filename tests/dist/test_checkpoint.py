from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint import layout
from megalm.errors import CheckpointError
from megalm.models.gpt.weights import EMBEDDING_LAYER, FIRST_BLOCK_LAYER
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

# (processes, tp, pp, ZeRO stage, dtype): every optimizer that DeepSpeed wraps.
ENGINES = [
    pytest.param(2, 1, 2, 0, "fp32", id="fp32-pp2"),
    pytest.param(4, 2, 2, 0, "fp32", id="fp32-tp2-pp2"),
    pytest.param(4, 1, 2, 1, "fp32", id="fp32-zero1-pp2-dp2"),
    pytest.param(4, 2, 1, 1, "bf16", id="bf16-zero1-tp2-dp2"),
    pytest.param(2, 1, 1, 2, "fp32", id="fp32-zero2-dp2"),
    pytest.param(2, 1, 1, 2, "bf16", id="bf16-zero2-dp2"),
    pytest.param(2, 1, 1, 3, "fp32", id="fp32-zero3-dp2"),
    pytest.param(2, 1, 1, 3, "bf16", id="bf16-zero3-dp2"),
    pytest.param(2, 1, 2, 0, "fp16", id="fp16-pp2"),
    pytest.param(2, 1, 1, 3, "fp16", id="fp16-zero3-dp2"),
]


def save_then_go_on(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train 3 steps, save, train 3 more; then a fresh run loads and trains the same 3."""
    from megalm.checkpoint.find import find_checkpoint
    from megalm.checkpoint.load import load_checkpoint
    from megalm.checkpoint.save import save_checkpoint
    from tests.support.half import allow_fp16
    from tests.support.training import TinyRun, tiny_config

    config = tiny_config(**options)
    if options["dtype"] == "fp16":
        allow_fp16()
        # Twice as much after two steps, and after two more.
        config = replace(config, training=replace(config.training, initial_loss_scale=256.0, loss_scale_window=2))
    run = TinyRun(config)
    run.train(0, 3)
    save_checkpoint(
        run.engine.raw,
        folder,
        {"step": 3, "consumed_samples": 12},
        config=config,
        topology=run.topology,
        rng=run.streams.state_dict(),
    )
    at_save = run.digest()
    uninterrupted = run.train(3, 6)
    at_end = run.digest()

    again = TinyRun(config, topology=run.topology)
    path = find_checkpoint(folder, world=run.topology.world)
    loaded = load_checkpoint(again.engine.raw, path, config=config, topology=run.topology)
    assert loaded.rng is not None
    again.streams.load_state_dict(loaded.rng)
    return {
        "state": loaded.state,
        "uninterrupted": uninterrupted,
        "at_save": at_save,
        "at_load": again.digest(),
        "resumed": again.train(3, 6),
        "at_end": at_end,
        "resumed_end": again.digest(),
        "scales": [dict(vars(one.engine.raw.optimizer.loss_scaler)) for one in (run, again)]
        if options["dtype"] == "fp16"
        else [{}, {}],
        "steps": (run.engine.raw.global_steps, again.engine.raw.global_steps),
    }


@pytest.mark.parametrize("world_size, tp, pp, zero_stage, dtype", ENGINES)
def test_resumed_run_is_bit_identical(
    tmp_path: Path, world_size: int, tp: int, pp: int, zero_stage: int, dtype: str
) -> None:
    options = {"tp": tp, "pp": pp, "zero_stage": zero_stage, "dtype": dtype}
    for result in run_ranks(save_then_go_on, world_size, str(tmp_path), options):
        assert result["at_load"] == result["at_save"]
        assert result["resumed"] == result["uninterrupted"]
        assert result["resumed_end"] == result["at_end"]
        assert result["state"] == {"step": 3, "consumed_samples": 12}
        assert result["steps"] == (6, 6)
        assert result["scales"][0] == result["scales"][1]
        assert result["scales"][0].get("cur_scale", 1024.0) == 1024.0
    stage = zero_stage if dtype == "fp32" else max(zero_stage, 1)
    check_files(tmp_path, tp=tp, pp=pp, dp=world_size // (tp * pp), zero_stage=stage, dtype=dtype)


def check_files(folder: Path, *, tp: int, pp: int, dp: int, zero_stage: int, dtype: str) -> None:
    """The names on the disk are those of layout.py, and nothing else is left over."""
    assert (folder / layout.LATEST).read_text() == "global_step3"
    assert sorted(os.listdir(folder)) == ["global_step3", "latest"]
    expected = {layout.TRAIN_STATE, layout.CONFIG, layout.MANIFEST}
    layers = [EMBEDDING_LAYER, FIRST_BLOCK_LAYER, FIRST_BLOCK_LAYER + 1, FIRST_BLOCK_LAYER + 3]
    expected |= {layout.layer_file(index, rank) for index in layers for rank in range(tp)}
    for stage in range(pp):
        for tensor in range(tp):
            rank = layout.model_rank(pp_rank=stage, tp_rank=tensor, tp_size=tp)
            for data in range(dp):
                expected.add(layout.rng_file(tp_rank=tensor, pp_rank=stage, dp_rank=data))
                if zero_stage > 0:
                    expected.add(layout.optimizer_file(dp_rank=data, mp_rank=rank, bf16=dtype == "bf16"))
                if zero_stage == 3:
                    expected.add(layout.sharded_model_file(dp_rank=data, mp_rank=rank))
            if zero_stage < 3:
                expected.add(layout.model_file(rank))
    assert set(os.listdir(folder / "global_step3")) == expected


FAULTS = [
    (rank, operation) for rank in (0, 1) for operation in ("open_new", "write_all", "sync", "sync_folder", "rename")
]


def save_with_faults(folder: str) -> list[str]:
    """A save of each step, with a disk that fails on one rank at one operation; returns what each save said."""
    from megalm.checkpoint import durable
    from megalm.checkpoint.save import save_checkpoint
    from tests.support.training import TinyRun, tiny_config

    config = tiny_config(tp=1, pp=2, zero_stage=1)
    run = TinyRun(config)
    raw, topology = run.engine.raw, run.topology

    def save(step: int) -> str:
        try:
            return save_checkpoint(raw, folder, {"step": step}, config=config, topology=topology).path.name
        except CheckpointError as error:
            return str(error)

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    said = [save(1)]
    for step, (rank, operation) in enumerate(FAULTS, start=2):
        original = getattr(durable, operation)
        if topology.world.rank == rank:
            setattr(durable, operation, fail)
        said.append(save(step))
        setattr(durable, operation, original)
    return [*said, save(100)]


def test_a_fault_on_one_rank_is_one_error_on_all_and_publishes_nothing(tmp_path: Path) -> None:
    from megalm.checkpoint.find import find_checkpoint

    said, said_by_the_other = run_ranks(save_with_faults, 2, str(tmp_path))
    assert said == said_by_the_other
    published = {1, 100}
    for step, (rank, operation) in enumerate(FAULTS, start=2):
        if rank == 1 and operation in ("sync_folder", "rename"):  # the first rank alone publishes
            published.add(step)
            continue
        assert "failed on 1 of 2 ranks" in said[step - 1]
        assert f"rank {rank}: OSError: [Errno 28] No space left on device" in said[step - 1]
    assert set(os.listdir(tmp_path)) == {"latest", *(f"global_step{step}" for step in published)}
    assert find_checkpoint(tmp_path).name == "global_step100"
    for step in published:
        assert find_checkpoint(tmp_path, step=step).name == f"global_step{step}"


READS = ("open_checkpoint", "read_engine_state", "_read_rng")


def load_with_faults(folder: str) -> list[str]:
    """A load with a disk that fails on the second rank at each of `READS`; returns what each load said."""
    from megalm.checkpoint import load
    from megalm.checkpoint.save import save_checkpoint
    from tests.support.training import TinyRun, tiny_config

    config = tiny_config(tp=1, pp=2)
    run = TinyRun(config)
    raw, topology = run.engine.raw, run.topology
    path = save_checkpoint(raw, folder, {"step": 1}, config=config, topology=topology).path

    def fail(*args: Any, **options: Any) -> None:
        raise CheckpointError("a stale file handle")

    said = []
    for read in READS:
        original = getattr(load, read)
        if topology.world.rank == 1:
            setattr(load, read, fail)
        try:
            load.load_checkpoint(raw, path, config=config, topology=topology)
            said.append("loaded")
        except CheckpointError as error:
            said.append(str(error))
        setattr(load, read, original)
    return said


def test_a_file_that_one_rank_cannot_read_is_one_error_on_all(tmp_path: Path) -> None:
    said, said_by_the_other = run_ranks(load_with_faults, 2, str(tmp_path))
    assert said == said_by_the_other
    assert all("a stale file handle" in text for text in said)

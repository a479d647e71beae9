from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint.find import find_checkpoint
from megalm.errors import CheckpointError
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist


def save_while_training(folder: str) -> dict[str, Any]:
    """Saves in the background, with training between the start and the end of the first."""
    from megalm.checkpoint.background import BackgroundSaver
    from tests.support.training import TinyRun, tiny_config

    config = tiny_config(tp=1, pp=2, zero_stage=1)
    run = TinyRun(config)
    raw, topology = run.engine.raw, run.topology
    run.train(0, 2)
    state = {"step": 2, "consumed_samples": 8}
    rng = run.streams.state_dict()
    saver = BackgroundSaver(topology, keep_last=2)
    assert saver.start(raw, folder, state, config=config, rng=rng) is None
    in_flight = [saver.in_flight]
    step, report = 2, None
    while report is None:
        run.train(step, step + 1)
        step += 1
        report = saver.poll()
        assert step < 200
    in_flight.append(saver.in_flight)
    # The next one waits for nothing; a save that is in flight is finished by the one after it.
    assert saver.start(raw, folder, {**state, "step": 5}, config=config, rng=rng) is None
    previous = saver.start(raw, folder, {**state, "step": 7}, config=config, rng=rng)
    assert previous is not None
    last = saver.finish()
    assert last is not None
    assert saver.finish() is None
    topology.barrier()
    return {
        "in_flight": in_flight,
        "names": (report.path.name, previous.path.name, last.path.name),
        "stall": report.stall_seconds <= report.elapsed_seconds,
    }


def test_training_goes_on_while_at_most_one_save_is_written(tmp_path: Path) -> None:
    results = run_ranks(save_while_training, 2, str(tmp_path))
    for result in results:
        assert result["in_flight"] == [True, False]
        assert result["names"] == ("global_step2", "global_step5", "global_step7")
        assert result["stall"]
    assert sorted(os.listdir(tmp_path)) == ["global_step5", "global_step7", "latest"]
    assert find_checkpoint(tmp_path).name == "global_step7"


def background_then_go_on(folder: str) -> tuple[list[str], str, str]:
    """Files of a synchronous and of a background save of one instant, by hash; training goes on during the latter."""
    from megalm.checkpoint.background import BackgroundSaver
    from megalm.checkpoint.manifest import read_manifest
    from megalm.checkpoint.save import save_checkpoint
    from tests.support.training import TinyRun, tiny_config

    config = tiny_config(tp=2, pp=1, zero_stage=0)
    run = TinyRun(config)
    run.train(0, 2)
    saver = BackgroundSaver(run.topology)
    rng = run.streams.state_dict()
    save_checkpoint(run.engine.raw, f"{folder}/a", {"step": 2}, config=config, topology=run.topology, rng=rng)
    saver.start(run.engine.raw, f"{folder}/b", {"step": 2}, config=config, rng=rng)
    run.train(2, 4)
    saver.finish()
    run.topology.barrier()
    first, second = (
        {r.name: r.sha256 for r in read_manifest(Path(folder) / name / "global_step2").files} for name in "ab"
    )
    return [name for name in first if first[name] != second[name]], str(len(first)), str(len(second))


def test_background_files_equal_synchronous_ones_byte_for_byte(tmp_path: Path) -> None:
    for different, first, second in run_ranks(background_then_go_on, 2, str(tmp_path)):
        assert different == []
        assert first == second


def fail_in_the_background(folder: str, faulty_rank: int, operation: str) -> str:
    """A background save whose disk fails on one rank; returns what the next boundaries said."""
    from megalm.checkpoint import durable
    from megalm.checkpoint.background import BackgroundSaver
    from tests.support.training import TinyRun, tiny_config

    config = tiny_config(tp=1, pp=2, zero_stage=0)
    run = TinyRun(config)
    saver = BackgroundSaver(run.topology)
    saver.start(run.engine.raw, folder, {"step": 1}, config=config)
    saver.finish()
    original = getattr(durable, operation)

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    if run.topology.world.rank == faulty_rank:
        setattr(durable, operation, fail)
    try:
        saver.start(run.engine.raw, folder, {"step": 2}, config=config)
        for _ in range(200):
            saver.poll()
            time.sleep(0.02)
        said = "silence"
    except CheckpointError as error:
        said = str(error)
    setattr(durable, operation, original)
    assert not saver.in_flight
    saver.start(run.engine.raw, folder, {"step": 3}, config=config)
    saver.finish()
    return said


@pytest.mark.parametrize("faulty_rank, operation", [(0, "write_all"), (1, "sync"), (0, "rename")])
def test_a_failed_background_write_is_an_error_at_the_next_boundary(
    tmp_path: Path, faulty_rank: int, operation: str
) -> None:
    said = run_ranks(fail_in_the_background, 2, str(tmp_path), faulty_rank, operation)
    assert said[0] == said[1]
    assert f"rank {faulty_rank}: OSError: [Errno 28] No space left on device" in said[0]
    assert sorted(os.listdir(tmp_path)) == ["global_step1", "global_step3", "latest"]
    assert find_checkpoint(tmp_path).name == "global_step3"

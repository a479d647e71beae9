"""The launcher's variables are read whole or refused."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch

from megalm.errors import TopologyError
from megalm.topology.start import Launch, start, stop

COMPLETE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_a_process_without_launcher_is_a_run_of_one() -> None:
    assert Launch.from_environment({}) == Launch(rank=0, world_size=1, local_rank=0)


def test_the_launcher_is_believed() -> None:
    assert Launch.from_environment(COMPLETE) == Launch(rank=3, world_size=4, local_rank=1)


def test_tasks_of_srun_without_a_rank_are_no_runs_of_one_process() -> None:
    tasks = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    with pytest.raises(TopologyError, match="srun bash launch/slurm/task.sh"):
        Launch.from_environment(tasks)
    assert Launch.from_environment({**tasks, **COMPLETE}).world_size == 4
    assert Launch.from_environment({**tasks, "SLURM_STEP_NUM_TASKS": "1"}).world_size == 1


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "MASTER_ADDR", "WORLD_SIZE"])
def test_half_an_environment_is_refused_by_name(missing: str) -> None:
    environment = {name: value for name, value in COMPLETE.items() if name != missing}
    with pytest.raises(TopologyError, match=missing):
        Launch.from_environment(environment)


def test_a_rank_that_is_no_number_is_refused() -> None:
    with pytest.raises(TopologyError, match="whole numbers"):
        Launch.from_environment({**COMPLETE, "RANK": "first"})


LEAVING = """
import atexit, concurrent.futures, sys, threading, time
from megalm.topology.start import leave

class EndOfTheInterpreter:
    def __del__(self):
        print("the interpreter took itself down", flush=True)

kept_until_the_end = EndOfTheInterpreter()
atexit.register(print, "exit handler")
pool = concurrent.futures.ThreadPoolExecutor(1)
pool.submit(int).result()  # its thread waits for more, as those that read batches ahead do
threading.Thread(target=lambda: (time.sleep(0.2), print("thread finished"))).start()
sys.stderr.write("no newline at the end")
leave(75)
"""


def test_leaving_finishes_threads_and_handlers_and_skips_the_end_of_the_interpreter() -> None:
    ended = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 75
    assert ended.stdout == "thread finished\nexit handler\n"
    assert ended.stderr == "no newline at the end"


def destroying(monkeypatch: pytest.MonkeyPatch, destroy: Callable[[], None]) -> None:
    """A process group whose end is `destroy`."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.destroy_process_group", destroy)


def test_a_rank_with_an_error_leaves_without_those_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under NCCL, where a rank that parts from a group waits until the others part from it."""
    others_come = threading.Event()
    destroying(monkeypatch, lambda: None if others_come.wait() else None)
    started = time.monotonic()
    stop(patience_seconds=0.1)
    assert time.monotonic() - started < 5.0
    others_come.set()


@pytest.mark.parametrize("patience_seconds", [None, 5.0])
def test_ranks_that_end_together_leave_the_group(
    monkeypatch: pytest.MonkeyPatch, patience_seconds: float | None
) -> None:
    left: list[bool] = []
    destroying(monkeypatch, lambda: left.append(True))
    stop(patience_seconds=patience_seconds)
    assert left == [True]


def test_a_process_without_a_gpu_of_its_own_is_refused_before_it_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Slurm shows each process one GPU, which is number 0 to all of them."""
    monkeypatch.setattr("megalm.topology.start.device_type", lambda: "cuda")
    monkeypatch.setattr("megalm.topology.start._join", lambda *_: pytest.fail("joined"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(TopologyError, match="LOCAL_RANK 1") as refusal:
        start(Launch(rank=1, world_size=2, local_rank=1), tp=1, pp=1)
    assert refusal.value.is_of_one_rank


def test_a_process_takes_its_gpu_before_it_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[object] = []

    def join(*_: object) -> None:
        taken.append("joined")
        raise InterruptedError

    monkeypatch.setattr("megalm.topology.start.device_type", lambda: "cuda")
    monkeypatch.setattr("megalm.topology.start._join", join)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    with pytest.raises(InterruptedError):
        start(Launch(rank=7, world_size=8, local_rank=3), tp=1, pp=1)
    assert taken == [torch.device("cuda", 3), "joined"]

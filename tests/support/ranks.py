"""Runs a function on several gloo ranks of this host, quickly.

Importing torch and DeepSpeed costs seconds, so the ranks are forked from a server process that has imported them once
(multiprocessing's forkserver). Each call gets fresh processes: no state leaks from one test into the next.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

from megalm.topology.ports import free_port

PRELOADED = ["tests.support.preloaded"]
TIMEOUT_SECONDS = 180.0


class RankFailure(AssertionError):
    """A rank raised, died or did not finish; carries every rank's traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = TIMEOUT_SECONDS) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks with a launcher's environment, and return their results in order.

    `function` must be defined at the top of a module; it reads its rank through `Launch.from_environment()` or
    torch.distributed. Raises: RankFailure.
    """
    context = _context()
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(sender, rank, world_size, port, function, args), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return _collect(pipes, processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _context() -> Any:
    os.environ.update(
        DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false"
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _collect(pipes: list[Any], processes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(enumerate(pipes))
    while waiting and not failures:
        ready = multiprocessing.connection.wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            failures[-1] = f"ranks {sorted(waiting)} did not finish in time"
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                succeeded, value = waiting.pop(rank).recv()
            except EOFError:
                processes[rank].join(5)
                succeeded, value = False, f"process ended with exit code {processes[rank].exitcode}"
            (results if succeeded else failures)[rank] = value
    if failures:
        _gather_late_failures(waiting, failures)
        raise RankFailure("\n".join(f"--- rank {rank}\n{text}" for rank, text in sorted(failures.items())))
    return [results[rank] for rank in range(len(pipes))]


def _gather_late_failures(waiting: dict[int, Any], failures: dict[int, str]) -> None:
    """The first rank to fail is often the victim of another one: give the others two seconds to say why."""
    deadline = time.monotonic() + 2.0
    for rank, pipe in waiting.items():
        if pipe.poll(max(0.0, deadline - time.monotonic())):
            try:
                succeeded, value = pipe.recv()
            except EOFError:
                succeeded, value = False, "process ended without a result"
            if not succeeded:
                failures[rank] = value


def _rank_main(sender: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import torch

    torch.set_num_threads(1)
    try:
        sender.send((True, function(*args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
        # A failed peer leaves gloo threads waiting; leaving at once is what a test wants.
        os._exit(0)

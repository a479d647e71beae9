"""The program as a job of real processes, watched, signalled and killed as a launcher or a broken host would.

Ranks are forked from a server that has imported everything once; each runs pretrain_gpt.py as `__main__` in a session
of its own and ends with the program's own exit code.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.topology.ports import free_port
from tests.support.launching import processes_of_session
from tests.support.ranks import PRELOADED

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 120.0
SECONDS_TO_END = 0.7
"""What the other ranks get once one has failed; then they are killed, as launchers do."""

Preparation = Callable[..., None]
"""Called with the rank and further arguments before the program starts, in its process."""


@dataclass(frozen=True)
class JobEnd:
    """How a job ended."""

    code: int
    """Exit code of the first rank that failed, else the largest; a killed rank's is minus the signal."""
    codes: tuple[int, ...]
    output: str
    """What all ranks printed."""
    seconds: float
    left: tuple[int, ...]
    """Processes that were still there when every rank had ended."""


class Job:
    """A run of the program on `world_size` ranks. Use it as a context manager: nothing outlives the context."""

    def __init__(
        self,
        flags: Sequence[str],
        *,
        world_size: int,
        logs: Path,
        prepare: Preparation | None = None,
        arguments: Sequence[Any] = (),
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = [logs / f"rank{rank}.log" for rank in range(world_size)]
        for log in self._logs:
            log.write_bytes(b"")
        context = _context()
        port = free_port()
        self._started = time.monotonic()
        self._processes = []
        for rank in range(world_size):
            own = (rank, world_size, port, list(flags), str(self._logs[rank]), prepare, tuple(arguments))
            process = context.Process(target=_rank_main, args=own, daemon=True)
            process.start()
            self._processes.append(process)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        for process in self._processes:
            process.join()

    @property
    def pids(self) -> list[int]:
        """Process ids in rank order."""
        return [process.pid for process in self._processes]

    @property
    def running(self) -> bool:
        """Whether no rank has ended yet."""
        return all(process.is_alive() for process in self._processes)

    def output(self) -> str:
        """What all ranks have printed so far."""
        texts = [log.read_text(encoding="utf-8", errors="replace") for log in self._logs]
        return "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(texts) if text.strip())

    def send(self, number: int, ranks: Iterable[int] | None = None) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in range(len(self._processes)) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, number)

    def kill(self, ranks: Iterable[int] | None = None) -> None:
        """kill -9."""
        self.send(signal.SIGKILL, ranks)

    def wait(self, *, timeout: float = TIMEOUT_SECONDS) -> JobEnd:
        """Wait for every rank; once one has failed the others get little time. A job that hangs is an error."""
        deadline = time.monotonic() + timeout
        first: int | None = None
        waiting = list(self._processes)
        while waiting:
            ready = multiprocessing.connection.wait([p.sentinel for p in waiting], timeout=deadline - time.monotonic())
            if not ready and first is None:
                self.kill()
                raise AssertionError(f"the job did not end within {timeout:.0f} s\n{self.output()}")
            for process in [p for p in waiting if p.sentinel in ready]:
                process.join()
                waiting.remove(process)
                if first is None and process.exitcode not in (0, 75):
                    first = process.exitcode
                    deadline = min(deadline, time.monotonic() + SECONDS_TO_END)
            if not ready:
                self.kill()
                deadline = time.monotonic() + 10.0
        codes = tuple(process.exitcode for process in self._processes)
        left = [pid for process in self._processes for pid in processes_of_session(process.pid)]
        return JobEnd(
            code=max(codes) if first is None else first,
            codes=codes,
            output=self.output(),
            seconds=time.monotonic() - self._started,
            left=tuple(left),
        )

    def wait_for(self, condition: Callable[[], bool], *, timeout: float = TIMEOUT_SECONDS) -> bool:
        """Poll until `condition` holds; False if a rank ends first."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.running:
                return False
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout:.0f} s in vain\n{self.output()}")
            time.sleep(0.002)
        return True


def run_job(flags: Sequence[str], *, world_size: int, logs: Path, **options: Any) -> JobEnd:
    """Start a job and wait for it."""
    with Job(flags, world_size=world_size, logs=logs, **options) as job:
        return job.wait()


def _context() -> Any:
    os.environ.update(
        DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false"
    )
    context = multiprocessing.get_context("forkserver")
    # Without effect if `ranks` has started the server already: then each rank imports the rest itself.
    context.set_forkserver_preload([*PRELOADED, "tests.support.preloaded_program"])
    return context


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    flags: list[str],
    log: str,
    prepare: Preparation | None,
    arguments: tuple[Any, ...],
) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.chdir(ROOT)
    sys.argv = ["pretrain_gpt.py", *flags]
    code = 1
    try:
        if prepare is not None:
            prepare(rank, *arguments)
        runpy.run_path(str(ROOT / "pretrain_gpt.py"), run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # A failed peer leaves gloo threads waiting; an interpreter that is torn down under them may crash.
        os._exit(code)

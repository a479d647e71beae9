"""How long this process has been kept from computing."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed

_SCHEDULED = "/proc/thread-self/schedstat"
"""Of the thread that opens it: nanoseconds on a core, and nanoseconds ready to run without one."""


class WaitClock:
    """Counts what the thread that trains waits in collectives, sends and receives, whoever calls them, and for a core
    that other programs use.

    Over gloo the former are all of what a rank waits for others; NCCL's queue a wait on the GPU and return at once.
    """

    def __init__(self) -> None:
        self._waited = 0.0
        self._file: int | None = None
        self._without_core = 0.0
        """When counting ended."""

    @property
    def seconds(self) -> float:
        """So far."""
        return self._waited + self._for_a_core()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what this thread does while the body runs. torch 2.13 has no hook that gloo calls: its class of pending
        work gets another `wait`, through which blocking calls go too."""
        work: Any = torch.distributed.Work
        plain = work.wait

        def wait(pending: Any, *arguments: Any, **options: Any) -> Any:
            started, before = time.perf_counter(), self._for_a_core()
            try:
                return plain(pending, *arguments, **options)
            finally:
                # Once woken up a thread may wait for a core too, which is counted as such.
                self._waited += time.perf_counter() - started - (self._for_a_core() - before)

        with contextlib.suppress(OSError):  # Not every system has it.
            self._file = os.open(_SCHEDULED, os.O_RDONLY)
        work.wait = wait
        try:
            yield
        finally:
            work.wait = plain
            self._without_core = self._for_a_core()
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _for_a_core(self) -> float:
        if self._file is None:
            return self._without_core
        return int(os.pread(self._file, 64, 0).split()[1]) / 1e9

"""Where all ranks wait for each other before torch joins them, as torch says how many came, not which."""

from __future__ import annotations

import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn

from megalm.errors import HangError, TopologyError, listed
from megalm.topology.board import StoreBoard

SECONDS_BEFORE_WARNING = 60.0
SECONDS_AFTER = 10.0
"""What the others give the first rank beyond its limit, as it is the one that says how the meeting ended."""
SECONDS_TO_HEAR = 1.5
"""Several looks of a rank that waits for that word."""
OUTCOME = "outcome"
MISSING = "missing: "


class Meeting:
    """One rank at the store at which the launcher has all of them meet. The first one sees who is there, and tells."""

    def __init__(self, host: str, port: int, *, rank: int, world_size: int, serves: bool, prefix: str) -> None:
        """`serves` says whether this process holds the store; `prefix` is this start's of the ranks."""
        self._host, self._port = host, port
        self._rank, self._world_size = rank, world_size
        self._serves = serves
        self._prefix = prefix

    def board(self, *, limit_seconds: float, warn: Callable[[str], None]) -> StoreBoard:
        """What the ranks tell each other, once all are there. The first one warns of those that take long.

        Raises: HangError with those that do not come; TopologyError if another program has the port.
        """
        started = time.monotonic()
        store = self._store(limit_seconds)
        try:
            store.set(f"here/{self._rank}", socket.gethostname())
            if self._rank == 0:
                outcome = self._see_all(store, started, limit_seconds, warn)
            else:
                outcome = self._hear(store, started, limit_seconds + SECONDS_AFTER)
        except RuntimeError as error:  # torch's DistError
            self._find_nobody(limit_seconds, error)
        if outcome.startswith(MISSING):
            raise HangError(outcome.removeprefix(MISSING))
        return StoreBoard(self._host, self._port, prefix=f"megalm/{outcome}", kept=store)

    def _store(self, limit_seconds: float) -> Any:
        from torch.distributed import PrefixStore, TCPStore

        if not self._serves:
            self._reach(limit_seconds)
        try:
            # torch's own, which follows, shares the server of this one as long as this one is there.
            store = TCPStore(
                self._host,
                self._port,
                is_master=self._serves,
                timeout=timedelta(seconds=limit_seconds),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError as error:
            if self._serves:
                raise TopologyError(
                    f"rank 0 cannot serve the other ranks at port {self._port}: {' '.join(str(error).split())}\n"
                    "  MASTER_PORT set by the launcher\n"
                    "  give it a port that no other program has"
                ) from error
            self._find_nobody(limit_seconds, error)
        return PrefixStore(self._prefix, store)

    def _reach(self, limit_seconds: float) -> None:
        """Wait until somebody listens; torch's client would print stacks of C++ in the end."""
        for passed in _looks(time.monotonic()):
            try:
                socket.create_connection((self._host, self._port), timeout=5.0).close()
                return
            except OSError as error:
                if passed > limit_seconds:
                    self._find_nobody(limit_seconds, error)

    def _see_all(self, store: Any, started: float, limit_seconds: float, warn: Callable[[str], None]) -> str:
        """Wait for all ranks; tell them, and return, a word that is this run's alone, or who is missing."""
        missing = list(range(self._world_size))
        next_warning = SECONDS_BEFORE_WARNING
        outcome = secrets.token_hex(8)
        for passed in _looks(started):
            missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
            if not missing:
                break
            if passed > limit_seconds:
                outcome = MISSING + self._absence(store, missing, limit_seconds)
                break
            if passed > next_warning:
                next_warning *= 4.0
                warn(f"{self._named(missing)} not come yet, after {passed:.0f} s")
        store.set(OUTCOME, outcome)
        if missing:
            time.sleep(SECONDS_TO_HEAR)
        return outcome

    def _hear(self, store: Any, started: float, limit_seconds: float) -> str:
        for passed in _looks(started):
            if store.check([OUTCOME]):
                return str(store.get(OUTCOME).decode())
            if passed > limit_seconds:  # Another process serves, and rank 0 is not there.
                missing = [rank for rank in range(self._world_size) if not store.check([f"here/{rank}"])]
                return MISSING + self._absence(store, missing or [0], limit_seconds)
        raise AssertionError("looks have no end")

    def _absence(self, store: Any, missing: list[int], limit_seconds: float) -> str:
        there = sorted(set(range(self._world_size)) - set(missing))
        hosts = Counter(store.get(f"here/{rank}").decode() for rank in there)
        shown = listed([f"{count} on {host}" for host, count in hosts.items()])
        return (
            f"{self._named(missing)} not come within {limit_seconds / 60.0:.3g} minutes; here are {shown}\n"
            f"  they meet at {self._host}:{self._port}, MASTER_ADDR and MASTER_PORT set by the launcher\n"
            "  see on the hosts of those that are missing whether they were started, still import from a disk that "
            "hangs, or cannot reach that address; then start the run again"
        )

    def _named(self, ranks: list[int]) -> str:
        many = len(ranks) > 1
        return f"rank{'s' if many else ''} {listed(ranks)} of {self._world_size} {'have' if many else 'has'}"

    def _find_nobody(self, limit_seconds: float, cause: Exception) -> NoReturn:
        error = HangError(
            f"rank {self._rank} of {self._world_size} finds nobody at {self._host}:{self._port}, "
            f"within {limit_seconds / 60.0:.3g} minutes\n"
            "  rank 0 or torchrun's agent serves the others there; MASTER_ADDR and MASTER_PORT set by the launcher\n"
            "  see on its host whether it was started, still imports from a disk that hangs, or has ended, and whether "
            "this host can reach that address; then start the run again"
        )
        error.is_of_one_rank = True  # Who would speak for its host may be the one that is missing.
        raise error from cause


def _looks(started: float) -> Iterator[float]:
    """Seconds since `started`, now and after pauses that grow."""
    pause = 0.01
    while True:
        yield time.monotonic() - started
        time.sleep(pause)
        pause = min(0.5, 1.5 * pause)

"""Saving while training goes on: the step waits for the copy to host memory alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from megalm.checkpoint.agreement import agree, exchange
from megalm.checkpoint.draft import Draft
from megalm.checkpoint.durable import FileRecord
from megalm.checkpoint.engine_files import HostCopies
from megalm.checkpoint.retention import Retention
from megalm.checkpoint.save import SaveReport, begin_draft, write_rank_files
from megalm.config.root import Config
from megalm.topology.topology import Topology


class _Work:
    """A function in a thread, and what it raised. The process does not wait for the thread when it ends."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.failure: Exception | None = None
        self._function = function
        self._thread = Thread(target=self._run, name="megalm checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._function()
        except Exception as error:
            self.failure = error

    @property
    def running(self) -> bool:
        """Whether the function has not returned yet."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Wait until it has."""
        self._thread.join()


class BackgroundSaver:
    """At most one save in flight, in two phases: every rank writes its files, then the first rank publishes.

    The thread never communicates. Ranks agree where the training loop already stands at a step boundary: in `poll`
    after each step, and in `finish` before the next save and at the end of the run. Its methods are collective.
    """

    def __init__(self, topology: Topology, *, keep_last: int | None = None, keep_every: int | None = None) -> None:
        self._topology = topology
        self._retention = Retention(keep_last=keep_last, keep_every=keep_every)
        self._draft: Draft | None = None
        self._work: _Work | None = None
        self._copies = HostCopies()
        self._records: list[FileRecord] | None = None
        self._outcome: tuple[tuple[Path, ...], tuple[str, ...]] = ((), ())
        self._started = 0.0
        self._stall_seconds = 0.0

    @property
    def in_flight(self) -> bool:
        """Whether a save has been started and not published yet; the same on every rank."""
        return self._draft is not None

    def start(
        self,
        engine: Any,
        folder: str | Path,
        state: Mapping[str, Any],
        *,
        config: Config,
        rng: Mapping[str, Any] | None = None,
    ) -> SaveReport | None:
        """Copy everything to host memory and begin to write it; arguments are those of `save_checkpoint`.

        Waits for a save that is still in flight, and returns its report.
        Raises: CheckpointError, the same on every rank, if that one failed, or this one cannot begin.
        """
        report = self.finish()
        started = time.monotonic()
        draft = begin_draft(folder, state, config=config, topology=self._topology, retention=self._retention)
        copies = HostCopies()
        write_rank_files(engine, draft, copies, topology=self._topology, rng=rng)
        try:
            agree(copies.failure, self._topology.world, doing=f"saving {draft.final}")
        except Exception:
            self._discard(draft)
            raise
        self._draft, self._records, self._outcome = draft, None, ((), ())
        self._copies = copies
        self._work = _Work(copies.write)
        self._started, self._stall_seconds = started, time.monotonic() - started
        return report

    def poll(self) -> SaveReport | None:
        """Go on with the save in flight as far as it goes without waiting; returns its report once it is published.

        Communicates: while a save is in flight, one all-gather of small objects over the world.
        Raises: CheckpointError, the same on every rank, if the save failed. Nothing of it was published.
        """
        return self._advance(wait=False)

    def finish(self) -> SaveReport | None:
        """Wait for the save in flight, if there is one; returns its report.

        Raises: CheckpointError, the same on every rank, if the save failed. Nothing of it was published.
        """
        report = None
        while self.in_flight:
            report = self._advance(wait=True)
        return report

    def _advance(self, *, wait: bool) -> SaveReport | None:
        draft = self._draft
        if draft is None:
            return None
        started = time.monotonic()
        work = self._work
        if work is not None and wait:
            work.wait()
        running = work is not None and work.running
        failure = None if work is None or running else work.failure or self._copies.failure
        everyone = exchange((running, failure is not None, self._copies.records), self._topology.world)
        self._stall_seconds += time.monotonic() - started
        if any(failed for _, failed, _ in everyone):
            self._fail(draft, failure)
        if any(is_running for is_running, _, _ in everyone):
            return None
        if self._records is None:
            self._records = [record for _, _, records in everyone for record in records]
            self._work = _Work(self._publish) if self._topology.world.is_first else None
            return None
        self._draft = self._work = None
        removed, problems = self._outcome
        return SaveReport(
            path=draft.final,
            num_bytes=sum(record.bytes for record in self._records),
            elapsed_seconds=time.monotonic() - self._started,
            stall_seconds=self._stall_seconds,
            removed=removed,
            problems=problems,
        )

    def _publish(self) -> None:
        assert self._draft is not None
        assert self._records is not None
        self._outcome = self._draft.publish(self._records)

    def _fail(self, draft: Draft, failure: Exception | None) -> None:
        """Let every rank leave the save behind and raise.

        A rank that is still writing is waited for, so that the folder can be removed under it.
        """
        if self._work is not None:
            self._work.wait()
        self._draft = self._work = None
        try:
            agree(
                failure or self._copies.failure, self._topology.world, doing=f"saving {draft.final} in the background"
            )
        finally:
            self._discard(draft)

    def _discard(self, draft: Draft) -> None:
        if self._topology.world.is_first:
            draft.discard()

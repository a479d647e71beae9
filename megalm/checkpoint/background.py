"""Saving while training goes on: the step waits for the copy to host memory alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from megalm.checkpoint.agreement import AnyOf, agree
from megalm.checkpoint.draft import Draft, wait_until_seen
from megalm.checkpoint.durable import FileRecord, make_folder, unlink, write_text
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
        self._begun: set[Path] = set()
        self._work: _Work | None = None
        self._copies = HostCopies()
        self._asked: AnyOf | None = None
        self._publishing = False
        self._num_bytes = 0
        self._problems: tuple[str, ...] = ()
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
        Raises: CheckpointError, the same on every rank, if that one failed. What fails in this one, `poll` raises.
        """
        report = self.finish()
        started = time.monotonic()
        draft = Draft.of(Path(folder), state, config=config, sizes=self._topology.layout, retention=self._retention)
        if draft.folder not in self._begun:
            begin_draft(draft, topology=self._topology)
            self._begun.add(draft.folder)
        copies = HostCopies()
        write_rank_files(engine, draft, copies, topology=self._topology, rng=rng)
        self._draft, self._publishing, self._problems = draft, False, ()
        self._copies = copies
        self._work = _Work(partial(self._write, draft, copies))
        self._started, self._stall_seconds = started, time.monotonic() - started
        return report

    def _write(self, draft: Draft, copies: HostCopies) -> None:
        """Write this rank's files, and the list of them for the first rank."""
        make_folder(draft.temporary)
        copies.write()
        if copies.failure is None:
            records = json.dumps([asdict(record) for record in copies.records])
            write_text(draft.temporary / _records_name(self._topology.world.rank), records)

    def poll(self) -> SaveReport | None:
        """Go on with the save in flight as far as it goes without waiting; returns its report once it is published.

        What the ranks say at one boundary is acted upon at the next one, so that none waits for another.
        Communicates: while a save is in flight, one all-reduce of two integers over the world, in the background.
        Raises: CheckpointError, the same on every rank, if the save failed. Nothing of it was published.
        """
        if self._draft is None:
            return None
        started = time.monotonic()
        said = None if self._asked is None else self._asked.result()
        report = None if said is None else self._advance(said)
        self._asked = AnyOf(self._status(), self._topology) if self.in_flight else None
        self._stall_seconds += time.monotonic() - started
        return report

    def finish(self) -> SaveReport | None:
        """Wait for the save in flight, if there is one; returns its report.

        Raises: CheckpointError, the same on every rank, if the save failed. Nothing of it was published.
        """
        started = time.monotonic()
        report = None
        if self._asked is not None:
            self._asked.result()
            self._asked = None
        while self.in_flight:
            if self._work is not None:
                self._work.wait()
            said = AnyOf(self._status(), self._topology).result()
            self._stall_seconds += time.monotonic() - started
            report = self._advance(said)
        return report

    def _status(self) -> tuple[bool, bool]:
        """(this rank's thread is at work, it has failed)."""
        work = self._work
        if work is None:
            return False, False
        return (True, False) if work.running else (False, (work.failure or self._copies.failure) is not None)

    def _advance(self, said: tuple[bool, ...]) -> SaveReport | None:
        """Act on what the ranks said; the report when the save is published."""
        draft = self._draft
        assert draft is not None
        anyone_running, anyone_failed = said
        if anyone_failed:
            self._fail(draft)
        if anyone_running:
            return None
        if not self._publishing:
            self._publishing = True
            self._work = _Work(partial(self._publish, draft)) if self._topology.world.is_first else None
            return None
        self._draft = self._work = None
        return SaveReport(
            path=draft.final,
            num_bytes=self._num_bytes,
            elapsed_seconds=time.monotonic() - self._started,
            stall_seconds=self._stall_seconds,
            problems=self._problems,
        )

    def _publish(self, draft: Draft) -> None:
        num_ranks = self._topology.world.size
        wait_until_seen(draft.temporary, {_records_name(rank): None for rank in range(num_ranks)})
        records = []
        for rank in range(num_ranks):
            path = draft.temporary / _records_name(rank)
            records += [FileRecord(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
            unlink(path)
        self._num_bytes = sum(record.bytes for record in records)
        self._problems = draft.publish(records)

    def _fail(self, draft: Draft) -> None:
        """Let every rank leave the save behind and raise.

        A rank that is still writing is waited for, so that the folder can be removed under it.
        """
        work, self._work, self._draft, self._asked = self._work, None, None, None
        if work is not None:
            work.wait()
        self._begun.discard(draft.folder)
        failure = self._copies.failure or (work.failure if work is not None else None)
        try:
            agree(failure, self._topology.world, doing=f"saving {draft.final} in the background")
        finally:
            if self._topology.world.is_first:
                draft.discard()


def _records_name(rank: int) -> str:
    """File that tells the first rank what a rank has written; gone before the checkpoint is published."""
    return f"records_{rank:05d}.json"

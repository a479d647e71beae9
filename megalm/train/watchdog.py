"""Ends a run that hangs, and says which rank does what.

One rank that waits for ever, for a disk or a broken GPU or a collective that another rank skipped, halts all others in
their collectives. Each rank tells its watchdog what it is about to do, from when all ranks have met until they part. If
no rank has begun anything new for the limit, the watchdogs write the stacks of all threads, one of them names who is
where, and the processes end, so that whoever started the run can start it again from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import hashlib
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from megalm.config.root import Config
from megalm.errors import HangError, listed
from megalm.telemetry.console import PREFIX
from megalm.topology.board import Board
from megalm.topology.start import Launch

Item = TypeVar("Item")

EXIT_HUNG = HangError.exit_code
MINUTES_OF_A_PART = 120.0
"""The limit of each part of a run's start and end, unless --hang-timeout-minutes is more: sample maps of a terabyte
take far longer than a step."""
_LIBRARIES = (os.path.dirname(os.__file__), os.path.dirname(os.path.dirname(torch.__file__)), "<frozen")
NOTABLE_BYTES = 2**20
"""Reading or writing more than this between two looks is progress: a save or a load moves on."""
MOST_SECONDS_FOR_STACKS = 10.0
SECONDS_AFTER = 5
"""What the ranks that do not report give the one that does beyond that time."""
SECONDS_TO_WRITE = 3.0
"""The folder may lie on what hangs."""
STORE_THREAD = "pt_tcpstore"
"""How the names of the threads begin that serve torch's TCPStore, in torch 2.9 to 2.15."""
LOOKS_OF_A_DIGEST = 2
"""How many looks a digest of what all ranks told may stay the same before another rank takes over making it."""
WAITING = "waiting for data"
START, END = "the start", "the end"


class Mark(NamedTuple):
    """What a rank does, from when it said so."""

    operation: str
    place: str
    """A step, the start or the end."""
    limit_seconds: float

    @property
    def words(self) -> str:
        """As the other ranks and the report tell it."""
        return self.operation if self.place in (START, END) else f"{self.operation}, {self.place}"


class Told(NamedTuple):
    """What all ranks have told, as far as one that waits has to know it."""

    digest: str
    """Another one once any of them has told anything new."""
    limit_seconds: float
    """The longest of what they are in."""


class Watchdog:
    """One rank's. The thread that trains says where it is, everything else runs in a thread of the watchdog's own."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        limit_seconds: float,
        folder: Path | None,
        board: Board | None,
        leave: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
        num_bytes: Callable[[], int] | None = None,
    ) -> None:
        """`folder` receives the stacks, standard error without one; a limit of 0 watches nothing. `board` is None where
        there is one rank."""
        self._rank, self._world_size = rank, world_size
        self._limit = limit_seconds
        self._folder = folder
        self._board = board
        self._leave = leave
        self._clock = clock
        self._num_bytes = num_bytes or bytes_moved
        self._limit_of_a_part = max(limit_seconds, 60.0 * MINUTES_OF_A_PART)
        self._mark = self._interrupted = Mark("starting", START, self._limit_of_a_part)
        self._seen: Mark | None = None
        self._bytes = 0
        self._since = self._looked = clock()
        self._pulse = 0
        self._others: Told | None = None
        """What all ranks had told when this one was first found to wait, or None while it does not."""
        self._others_since = 0.0
        self._published = ""
        """The digest that this rank found last, as it stands on the board."""
        self._is_reader = False
        """Whether it is this rank's own: the next one is its to make too."""
        self._num_digests = 0
        self._num_same = 0
        """Looks that have found it the same."""
        self._is_alone = False
        self._over = threading.Event()

    def minutes_of_collectives(self, *, starting: bool) -> float | None:
        """What torch may give a collective, so that this watchdog speaks first; None if it watches nothing."""
        limit = self._limit_of_a_part if starting else self._limit
        return 2.0 * limit / 60.0 + 10.0 if self._limit > 0 else None

    def at(self, operation: str, step: int) -> None:
        """Say what this rank does from now on; to be called at every beginning, as that is its progress."""
        self._mark = Mark(operation, f"step {step}", self._limit)

    def starts(self, part: str) -> None:
        """Say the same of a part of the start, which may take longer than a step."""
        self._mark = Mark(part, START, self._limit_of_a_part)

    def ends(self, part: str) -> None:
        """Say the same of a part of the end. Ranks end one after the other: from here on each is watched by itself."""
        self._mark = Mark(part, END, self._limit_of_a_part)
        self._is_alone = True

    def compiles(self) -> None:
        """Say that torch.compile has begun, within what this rank does: it may take longer than a step."""
        self._interrupted = self._mark
        self._mark = Mark("compiling", self._mark.place, self._limit_of_a_part)

    def has_compiled(self) -> None:
        """Go on with what `compiles` interrupted."""
        self._mark = Mark(*self._interrupted)

    def batches(self, batches: Iterator[Item], operation: str, step: int) -> Iterator[Item]:
        """`batches`, for a reader that is in `operation` when it does not wait for them."""
        while True:
            self.at(WAITING, step)
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.at(operation, step)
            yield batch

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the body runs."""
        if self._limit <= 0:
            yield
            return
        thread = threading.Thread(target=self._watch, name="megalm watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join(timeout=1.0)  # What it tells others would end in warnings, once their store is gone.

    def _watch(self) -> None:
        while not self._over.wait(min(5.0, self._limit / 10.0)):
            self.look()

    def look(self) -> None:
        """Compare with the last look, and do what is due."""
        if self._is_alone:
            self._board = None
        now, mark, moved = self._clock(), self._mark, self._num_bytes()
        was_stopped = now - self._looked > self._limit / 2.0  # This thread was: time begins anew.
        self._looked = now
        if was_stopped or mark is not self._seen or moved - self._bytes > NOTABLE_BYTES:
            self._seen, self._bytes, self._since, self._others = mark, moved, now, None
            self._published, self._is_reader, self._num_same = "", False, 0
            self._pulse += 1
            if self._board is not None:
                self._board.put(f"mark/{self._rank}", f"{self._pulse} {mark.limit_seconds:g} {mark.words}")
            return
        if now - self._since < mark.limit_seconds / 5.0:
            return
        # This rank waits. As long as another one moves on, it is right to; those are watched from here on.
        claimed = None if self._board is None else (self._board.read(["hang"]) or {}).get("hang")
        if claimed is not None and claimed != str(self._rank):
            self._join_in()
            return
        told = self._told() or self._others or Told("", 0.0)
        if told != self._others:
            self._others, self._others_since = told, now
        elif self._num_same < LOOKS_OF_A_DIGEST and now - self._others_since >= max(
            mark.limit_seconds, told.limit_seconds
        ):
            self._end(mark)

    def _told(self) -> Told | None:
        """What all ranks have told. One of those that wait reads it and publishes a digest, which the others read: in a
        run of thousands of ranks, nearly all of which wait, the store would answer none of them in time if each read
        everything."""
        if self._board is None:
            return None
        found = self._board.read(["digest"])
        if found is None:
            self._num_same = 0
            return None
        published = found.get("digest", "")
        if published != self._published:
            self._published, self._is_reader, self._num_same = published, False, 0
            return _parsed(published)
        self._num_same += 1
        is_due = not published or self._num_same % LOOKS_OF_A_DIGEST == 0
        if self._is_reader or (is_due and self._takes_over(published)):
            return self._told_by_all()
        return _parsed(published) if published else None

    def _takes_over(self, published: str) -> bool:
        """Whether this rank, of those that find this digest to be old, makes the next one."""
        assert self._board is not None
        return self._board.claim(f"reader/{published}/{self._num_same}", str(self._rank)) == str(self._rank)

    def _told_by_all(self) -> Told | None:
        """Read all, and publish the digest of it."""
        marks = self._marks()
        if marks is None or self._board is None:
            return None
        text = "\n".join(f"{key} {words}" for key, words in sorted(marks.items()))
        told = Told(hashlib.sha256(text.encode()).hexdigest(), max(map(_limit_in, marks.values()), default=0.0))
        self._num_digests += 1
        self._published = f"{self._rank} {self._num_digests} {told.limit_seconds:g} {told.digest}"
        self._is_reader, self._num_same = True, 0
        self._board.put("digest", self._published)
        return told

    def _marks(self) -> dict[str, str] | None:
        """What each rank told last."""
        return None if self._board is None else self._board.read([f"mark/{rank}" for rank in range(self._world_size)])

    def _end(self, mark: Mark) -> None:
        """Report, unless another rank does."""
        claimed = None if self._board is None else self._board.claim("hang", str(self._rank))
        if claimed not in (None, str(self._rank)):
            self._join_in()
            return
        where = self._write_stacks()
        lines = self._report(mark, self._answers(), where)
        sys.stderr.write("".join(f"{PREFIX}{line}\n" for line in lines))
        sys.stderr.flush()
        self._leave(EXIT_HUNG)

    def _join_in(self) -> None:
        """Write this rank's stacks, and leave when the rank that reports has left."""
        self._write_stacks()
        assert self._board is not None
        self._board.put(f"stacks/{self._rank}", self._words())
        _hold_interpreter(int(self._seconds_for_stacks()) + SECONDS_AFTER)
        self._leave(EXIT_HUNG)

    def _seconds_for_stacks(self) -> float:
        return min(MOST_SECONDS_FOR_STACKS, 1.0 + self._limit / 4.0)  # Watchdogs look every tenth of the limit.

    def _answers(self) -> dict[int, str] | None:
        """Where the ranks are whose watchdogs have written stacks; None if the store does not answer."""
        found = {self._rank: self._words()}
        deadline = time.monotonic() + self._seconds_for_stacks()
        while self._board is not None and len(found) < self._world_size:
            told = self._board.read([f"stacks/{rank}" for rank in range(self._world_size)])
            if told is None:
                return None
            found.update((int(key.removeprefix("stacks/")), text) for key, text in told.items())
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return found

    def _report(self, mark: Mark, answers: dict[int, str] | None, where: Path | None) -> Iterator[str]:
        told = self._marks() or {}
        others = 0.0 if self._others is None else self._others.limit_seconds
        limit = max(mark.limit_seconds, others, *map(_limit_in, told.values()))
        yield (
            f"error: no rank has got any further for {limit / 60.0:.3g} minutes, the limit of "
            f"{'--hang-timeout-minutes' if limit == self._limit else 'parts of a start or end, and of compiling'}; "
            f"{mark.place} is ended with exit code {EXIT_HUNG}"
        )
        if answers is None:
            yield f"  rank {self._rank} says: the process at which ranks meet, rank 0 or its launcher, does not answer"
            answers = {self._rank: self._words()}
        elif self._board is not None:
            silent: dict[str, list[int]] = defaultdict(list)
            for rank in sorted(set(range(self._world_size)) - set(answers)):
                silent[told.get(f"mark/{rank}", "0 0 nothing").split(" ", 2)[2]].append(rank)
            for words, ranks in silent.items():
                verb, who = ("does", "it") if len(ranks) == 1 else ("do", "they")
                yield f"  {_ranks(ranks)} {verb} not answer; the last {who} told was {words}"
        places: dict[str, list[int]] = defaultdict(list)
        for rank, words in sorted(answers.items()):
            places[words].append(rank)
        for words, ranks in sorted(places.items(), key=lambda place: len(place[1])):
            yield f"  {_ranks(ranks)}: {words}"
        stacks = f"{where.parent}/rank_N.txt" if where is not None else "above, on each rank's standard error"
        yield f"  stacks of those that answer: {stacks}"
        yield (
            "  start the run again with --load; what takes longer needs a --hang-timeout-minutes of more than "
            f"{limit / 60.0:.3g}"
        )

    def _words(self) -> str:
        """What this rank does, and where its first thread is in code that belongs to no library."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
            frame = frame.f_back
        where = ""
        if frame is not None:
            where = f", in {frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
        return f"{self._mark.words}{where}"

    def _write_stacks(self) -> Path | None:
        """Write the stacks of all threads, to standard error where there is no folder to write to."""
        if self._folder is not None:
            place = self._mark.place.removeprefix("the ").replace(" ", "")
            path = self._folder / place / f"rank_{self._rank}.txt"
            written: list[Path] = []
            writer = threading.Thread(target=self._write_stacks_to, args=(path, written), daemon=True)
            writer.start()
            writer.join(timeout=SECONDS_TO_WRITE)
            if written:
                return path
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        return None

    def _write_stacks_to(self, path: Path, written: list[Path]) -> None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(f"rank {self._rank}: {self._words()}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            written.append(path)


def _limit_in(words: str) -> float:
    """The limit that a rank has told."""
    return float(words.split(" ", 2)[1])


def _parsed(published: str) -> Told:
    """A digest as it stands on the board: the rank that made it, how many it has made, the limit, and the digest."""
    _, _, limit, digest = published.split(" ")
    return Told(digest, float(limit))


def build_watchdog(config: Config, launch: Launch, *, board: Board | None) -> Watchdog:
    """The watchdog of this rank; `board` is None where there is one rank."""
    save = config.output.save
    return Watchdog(
        rank=launch.rank,
        world_size=launch.world_size,
        limit_seconds=60.0 * config.training.hang_timeout_minutes,
        folder=None if save is None else Path(save) / "hangs",
        board=board,
    )


def bytes_moved() -> int:
    """Bytes that the other threads of this process have read and written, as Linux counts them; 0 elsewhere.

    Those that serve torch's store are none of them: watchdogs that wait ask it without end. Nor is what this thread
    reads here, which comes to megabytes in hours.
    """
    own = str(threading.get_native_id())
    try:
        moved = _bytes_of(Path("/proc/self"))
        threads = list(Path("/proc/self/task").iterdir())
    except OSError:
        return 0
    for thread in threads:
        with contextlib.suppress(OSError):  # It has ended.
            name = (thread / "comm").read_text(encoding="utf-8", errors="replace")
            if name.startswith(STORE_THREAD) or thread.name == own:
                moved -= _bytes_of(thread)
    return moved


def _bytes_of(task: Path) -> int:
    counts = dict(line.split(": ") for line in (task / "io").read_text(encoding="ascii").splitlines())
    return sum(int(counts.get(name, 0)) for name in ("rchar", "wchar", "read_bytes"))  # The last knows mapped files.


def _hold_interpreter(seconds: int) -> None:
    """Wait without letting any other thread of Python run: the one that trains would print that its peers are gone.

    A signal ends the wait.
    """
    ctypes.PyDLL(None).sleep(seconds)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks)}"

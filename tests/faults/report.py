"""Counts cases as k/n, says what n can prove, and keeps the table of docs/reliability.md."""

from __future__ import annotations

import contextlib
import math
import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MOST_FAILURES = 8
"""A count stops after so many: the rest would say the same."""

HEADER = """# Reliability

Faults are injected into real processes that talk over gloo: a GPT of two blocks in fp32 with dropout, saving every few
steps. After every fault the newest published checkpoint must verify, no more than a save interval may be lost, the
exit code must be the documented one and no process may be left; every checkpoint and every loss, bit for bit, must be
those of the run that nobody disturbed: parameters, optimizer and random-number states by the sha256 of their files.
B3 changes one bit of one rank's parameters: the run must end with exit code 9, name the parameter, save nothing of it
and, started again, come to the end of the undisturbed one.
C is bad data, given to what reads it in a run: the answer must be an error that names it, or the right tokens.
F are ranks that hang, with a limit of three seconds: every rank that can must write its stacks, one line must name the
rank at fault, and the run must end with exit code 8; steps, saves and evaluations that go on must not be taken for one.
Parts of a start and an end, which have hours, have four seconds there.
H are ranks that compute or read slowly: `--log-straggler` must name that rank, and none in a run without.
Spikes, in G, come of steps of random tokens: the run must go back, and from there be bit for bit the run that
`--skip-train-iteration-range` told by hand. I compares the number of every sample that any rank reads, and losses to
1e-5. J is one run whose command line is started again after every fault, and whose end must be the undisturbed one's.

Each line is written by the run that it reports, and replaced when that suite runs again. "shows" is the largest share
of failures that n cases can hide at 95 % confidence. `bash tests/run.sh tests/faults` runs the default suite,
`--full` every case, `--report docs/reliability.md` writes the lines of the suite that runs.

| id | fault | suite | k/n | shows failures below | seconds | date (UTC) | command |
|---|---|---|---|---|---|---|---|
"""
FOUND = "; found: "
ROW = re.compile(r"^\| (?P<id>[A-Z]\d*) \| (?P<what>[^|]*) \| (?P<suite>[^|]*) \|.*\|$", re.MULTILINE)


def largest_failure_rate(passed: int, total: int, *, confidence: float = 0.95) -> float:
    """Upper bound of the share of failures, having seen `total - passed` of them (Clopper and Pearson's)."""
    failed = total - passed
    if total == 0 or passed == 0:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        seen = sum(math.comb(total, k) * rate**k * (1 - rate) ** (total - k) for k in range(failed + 1))
        low, high = (rate, high) if seen > 1 - confidence else (low, rate)
    return high


@dataclass
class Count:
    """Cases of one kind of fault."""

    id: str
    what: str
    total: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    found: str = ""
    """A figure beside the count, in words."""

    @property
    def passed(self) -> int:
        return self.total - len(self.failures)

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """One case; what it raises is kept, and the next one gets its turn."""
        self.total += 1
        try:
            yield
        except Exception as error:
            # The message says it; the place helps where it does not.
            place = "".join(traceback.format_tb(error.__traceback__)[-2:])
            self.failures.append(f"{name}: {type(error).__name__}: {error}\n{place}")
            assert len(self.failures) < MOST_FAILURES, "\n".join(self.failures)


@dataclass
class Figures:
    """Every count of one session."""

    full: bool
    command: str
    counts: list[Count] = field(default_factory=list)

    @property
    def suite(self) -> str:
        return "full" if self.full else "default"

    @contextlib.contextmanager
    def count(self, id: str, what: str) -> Iterator[Count]:
        """Count cases; raises AssertionError at the end with every case that failed."""
        count = Count(id, what)
        self.counts.append(count)
        started = time.monotonic()
        try:
            yield count
        finally:
            count.seconds = time.monotonic() - started
        assert not count.failures, f"{count.passed}/{count.total} {what}\n" + "\n".join(count.failures)
        assert count.total > 0, f"no case of {what} was run"

    def lines(self) -> list[str]:
        """One line of the terminal's summary for each count."""
        return [
            f"{count.id:3} {count.passed}/{count.total} {_shown(count)}: less than {_percent(count)} fail, "
            f"{count.seconds:.1f} s"
            for count in sorted(self.counts, key=lambda count: count.id)
        ]

    def write(self, path: Path) -> None:
        """Put this session's rows into the table, in place of those that the same suite wrote earlier."""
        rows = {}
        if path.is_file():
            for match in ROW.finditer(path.read_text(encoding="utf-8")):
                rows[match["id"], match["what"].partition(FOUND)[0], match["suite"]] = match[0]
        date = time.strftime("%Y-%m-%d", time.gmtime())
        for count in self.counts:
            rows[count.id, count.what, self.suite] = (
                f"| {count.id} | {_shown(count)} | {self.suite} | {count.passed}/{count.total} | {_percent(count)} | "
                f"{count.seconds:.0f} | {date} | `{self.command}` |"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEADER + "".join(rows[key] + "\n" for key in sorted(rows)), encoding="utf-8")


def _shown(count: Count) -> str:
    return f"{count.what}{FOUND}{count.found}" if count.found else count.what


def _percent(count: Count) -> str:
    return f"{100 * largest_failure_rate(count.passed, count.total):.2g} %"

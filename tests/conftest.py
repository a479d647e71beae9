"""Options of the whole test suite, and what the fault tests of all its processes counted."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest

from tests.faults.report import Count, Figures
from tests.support.jobs import ROOT

FIGURES = pytest.StashKey[Figures]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--full", action="store_true", help="every fault, and every pair of layouts, instead of a sample")
    group.addoption(
        "--long-run-minutes",
        type=float,
        help="tests/faults: how long one run is disturbed; a third of a minute, two hours with --full",
    )
    group.addoption(
        "--report",
        metavar="FILE",
        help="tests/faults: write the figures of this run into FILE; docs/reliability.md with --full",
    )


def pytest_configure(config: pytest.Config) -> None:
    words = [os.path.relpath(word, ROOT) if os.path.isabs(word) else word for word in config.invocation_params.args]
    config.stash[FIGURES] = Figures(
        full=config.getoption("--full"), command=" ".join(["bash tests/run.sh", *map(str, words)])
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker of pytest-xdist: hand the counts on to the process that prints them."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["faults"] = [dataclasses.asdict(count) for count in session.config.stash[FIGURES].counts]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """In the process that started the workers: one of them has ended."""
    counts = getattr(node, "workeroutput", {}).get("faults", [])
    node.config.stash[FIGURES].counts += [Count(**count) for count in counts]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    figures = config.stash[FIGURES]
    if not figures.counts:
        return
    terminalreporter.section("faults")
    for line in figures.lines():
        terminalreporter.line(line)
    path = config.getoption("--report") or ("docs/reliability.md" if figures.full else None)
    if path is not None:
        figures.write(ROOT / path)
        terminalreporter.line(f"written to {path}")

"""What the fault tests share: the size of the suite, the counts, the corpus and the undisturbed runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.report import Figures
from tests.faults.trial import CleanRuns
from tests.support.jobs import ROOT
from tests.support.tiny_run import write_corpus

FIGURES = pytest.StashKey[Figures]()


def pytest_configure(config: pytest.Config) -> None:
    words = [os.path.relpath(word, ROOT) if os.path.isabs(word) else word for word in config.invocation_params.args]
    config.stash[FIGURES] = Figures(
        full=config.getoption("--full"), command=" ".join(["bash tests/run.sh", *map(str, words)])
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    figures = config.stash.get(FIGURES, None)
    if figures is None or not figures.counts:
        return
    terminalreporter.section("faults")
    for line in figures.lines():
        terminalreporter.line(line)
    path = config.getoption("--report") or ("docs/reliability.md" if figures.full else None)
    if path is not None:
        figures.write(ROOT / path)
        terminalreporter.line(f"written to {path}")


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Figures:
    """Where tests count their cases."""
    found = request.config.stash.get(FIGURES, None)
    if found is None:  # this file was found after the session had been configured
        pytest_configure(request.config)
        found = request.config.stash[FIGURES]
    return found


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether every case is asked for."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def clean_runs(tmp_path_factory: pytest.TempPathFactory) -> CleanRuns:
    """Runs that nobody disturbs, each made when it is first asked for."""
    folder: Path = tmp_path_factory.mktemp("clean")
    return CleanRuns(folder, corpus=write_corpus(folder, num_documents=400))

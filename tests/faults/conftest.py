"""What the fault tests share: the size of the suite, the counts, the corpus and the undisturbed runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import FIGURES
from tests.faults.report import Figures
from tests.faults.trial import CleanRuns
from tests.support.tiny_run import write_corpus


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Figures:
    """Where tests count their cases."""
    return request.config.stash[FIGURES]


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether every case is asked for."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def long_run_seconds(request: pytest.FixtureRequest, full: bool) -> float:
    """How long the long run is disturbed."""
    minutes = request.config.getoption("--long-run-minutes")
    if minutes is not None:
        return 60.0 * float(minutes)
    return 7200.0 if full else 12.0


@pytest.fixture(scope="session")
def clean_runs(tmp_path_factory: pytest.TempPathFactory) -> CleanRuns:
    """Runs that nobody disturbs, each made when it is first asked for."""
    folder: Path = tmp_path_factory.mktemp("clean")
    return CleanRuns(folder, corpus=write_corpus(folder, num_documents=400))

"""Options of the whole test suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--full", action="store_true", help="tests/faults: every case instead of the default's sample")
    group.addoption(
        "--report",
        metavar="FILE",
        help="tests/faults: write the figures of this run into FILE; docs/reliability.md with --full",
    )

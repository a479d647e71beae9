"""Options of the whole test suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--full", action="store_true", help="every fault, and every pair of layouts, instead of a sample")
    group.addoption(
        "--report",
        metavar="FILE",
        help="tests/faults: write the figures of this run into FILE; docs/reliability.md with --full",
    )

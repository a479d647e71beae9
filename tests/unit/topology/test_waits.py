"""What counts as waiting."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from megalm.topology import waits
from megalm.topology.waits import WaitClock


def test_waits_are_counted_while_they_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_: Any) -> str:
        time.sleep(0.02)
        return "done"

    monkeypatch.setattr(waits, "_SCHEDULED", str(tmp_path / "not there"))
    monkeypatch.setattr(torch.distributed.Work, "wait", slow)
    clock = WaitClock()
    work = torch.distributed.Work()
    work.wait()
    assert clock.seconds == 0.0
    with clock.counting():
        assert [work.wait(), work.wait()] == ["done", "done"]  # type: ignore[comparison-overlap]
        before = clock.seconds
        time.sleep(0.02)  # This rank's own.
        assert clock.seconds == before
    counted = clock.seconds
    work.wait()
    assert clock.seconds == counted >= 0.04
    assert torch.distributed.Work.wait is slow


def test_waits_for_a_core_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduled = tmp_path / "schedstat"

    def slow(_: Any) -> None:
        time.sleep(0.2)
        scheduled.write_text("1 1200000000 1\n")  # All of that it waited for a core.

    monkeypatch.setattr(waits, "_SCHEDULED", str(scheduled))
    monkeypatch.setattr(torch.distributed.Work, "wait", slow)
    scheduled.write_text("1 1000000000 1\n")
    clock = WaitClock()
    with clock.counting():
        assert clock.seconds == 1.0
        started = time.perf_counter()
        torch.distributed.Work().wait()
        elapsed = time.perf_counter() - started
        assert 1.2 <= clock.seconds <= 1.0 + elapsed
        counted = clock.seconds
        scheduled.write_text("1 1500000000 1\n")  # The same again, outside.
        assert clock.seconds == pytest.approx(counted + 0.3)
    scheduled.write_text("1 9000000000 1\n")
    assert clock.seconds == pytest.approx(counted + 0.3)

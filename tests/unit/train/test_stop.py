"""Every reason to stop is noticed, and signals finish the step instead of ending the process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalm.topology.topology import Topology
from megalm.train.stop import SIGNALS, StopReason, StopRequest


@pytest.fixture(autouse=True)
def restored_handlers() -> Iterator[None]:
    """Tests must not leave handlers behind: pytest's own Ctrl-C would stop working."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_becomes_a_request(number: signal.Signals) -> None:
    request = StopRequest()
    request.listen()
    assert request.agree(1, Topology.solo()) is StopReason.NONE
    os.kill(os.getpid(), number)
    assert request.agree(1, Topology.solo()) is StopReason.SIGNAL


def test_the_kill_switch_is_a_file(tmp_path: Path) -> None:
    switch = tmp_path / "stop"
    request = StopRequest(kill_switch_path=str(switch))
    assert request.local_reason(1) is StopReason.NONE
    switch.touch()
    assert request.local_reason(1) is StopReason.KILL_SWITCH
    assert request.local_reason(None) is StopReason.KILL_SWITCH


def test_interval_and_duration_are_noticed() -> None:
    assert StopRequest(exit_interval=5).local_reason(9) is StopReason.NONE
    assert StopRequest(exit_interval=5).local_reason(10) is StopReason.INTERVAL
    assert StopRequest(exit_interval=5).local_reason(None) is StopReason.NONE
    late = StopRequest(duration_minutes=0.0)
    late.listen()
    assert late.local_reason(1) is StopReason.DURATION

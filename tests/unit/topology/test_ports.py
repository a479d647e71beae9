"""Where the ports lie that the launch scripts choose."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megalm.topology import ports
from megalm.topology.ports import OUTGOING, free_port


def outgoing(folder: Path, text: str) -> Path:
    path = folder / "ip_local_port_range"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("first", "last"), [(32_768, 60_999), (1_024, 65_000), (15_000, 64_999), (10_100, 65_535)])
def test_ports_of_outgoing_connections_are_left_alone(tmp_path: Path, first: int, last: int) -> None:
    path = outgoing(tmp_path, f"{first}\t{last}\n")
    chosen = [free_port(path) for _ in range(200)]
    assert not [port for port in chosen if first <= port <= last]
    assert min(chosen) >= 10_000


def test_without_a_range_that_can_be_read_linux_usual_one_is_left_alone(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", outgoing(tmp_path, "none")):
        assert not [port for port in (free_port(path) for _ in range(200)) if 32_768 <= port <= 60_999]


def test_where_every_port_is_for_outgoing_connections_a_free_one_is_taken(tmp_path: Path) -> None:
    port = free_port(outgoing(tmp_path, "1024 65535"))
    with socket.socket() as probe:
        probe.bind(("", port))


def test_a_port_that_is_taken_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "LEAST", port)
        assert free_port(outgoing(tmp_path, f"{port + 1} 65535")) != port


def test_this_host_tells_its_range() -> None:
    first, last = map(int, OUTGOING.read_text().split())
    assert not first <= free_port() <= last

"""A port at which ranks can meet."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")
USUAL = (32_768, 60_999)
"""Linux's own choice of that range."""
LEAST = 10_000
"""Below are the ports of known services."""
TRIES = 100


def free_port(outgoing: Path = OUTGOING) -> int:
    """A port that nobody listens at, and that no outgoing connection is given before the ranks meet there.

    Where nearly all ports are for outgoing connections, any free one.
    """
    first, last = USUAL
    with contextlib.suppress(OSError, ValueError):
        first, last = map(int, outgoing.read_text(encoding="ascii").split())
    others = [*range(LEAST, first), *range(max(LEAST, last + 1), 2**16)]
    random_ports = random.SystemRandom().sample(others, min(TRIES, len(others)))
    for port in [*random_ports, 0]:  # The kernel chooses in place of 0.
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    raise OSError("this host has no free port")

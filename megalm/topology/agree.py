"""One outcome on all ranks: either everybody goes on, or everybody stops with the same error."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed

from megalm.errors import MegalmError
from megalm.topology.group import Group
from megalm.topology.topology import Topology

Result = TypeVar("Result")


def exchange(value: Result, world: Group) -> list[Result]:
    """Every rank's value, in rank order.

    Communicates: one all-gather of small objects over `world`.
    """
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(values, value, group=world.handle)
    return values


def lines_of_all(lines: Sequence[str], world: Group) -> list[str]:
    """What any rank would say, each line once, in the order of the ranks. Nearly always all would say the same, or a
    rank of each host something more: each list travels once, as thousands of ranks with a line for each of thousands
    of corpora would gather gigabytes.

    Communicates: one all-gather of 32 bytes over the world; where ranks differ, a broadcast of each of their lists.
    """
    digest = hashlib.sha256("\0".join(lines).encode()).digest()
    first_with: dict[bytes, int] = {}
    for rank, other in enumerate(exchange(digest, world)):
        first_with.setdefault(other, rank)
    if len(first_with) == 1:
        return list(dict.fromkeys(lines))
    found: list[str] = []
    for rank in first_with.values():
        sent: list[Any] = [list(lines) if rank == world.rank else None]
        torch.distributed.broadcast_object_list(sent, src=world.ranks[rank], group=world.handle)
        found += sent[0]
    return list(dict.fromkeys(found))


def together(topology: Topology, action: Callable[[], Result]) -> Result:
    """Run `action` on every rank; if it fails for the user's reasons on some rank, raise that error on all of them.

    Without this, the ranks that succeed would wait for the failed one until the timeout. `action` itself must not
    communicate, since a rank that fails early would leave the others inside it.

    Communicates: one all-gather of small objects over the world.
    Raises: the MegalmError of the first rank that failed; other exceptions pass as they are, being defects.
    """
    failure: MegalmError | None = None
    result: Result | None = None
    try:
        result = action()
    except MegalmError as error:
        failure = error
    failure = next((error for error in exchange(failure, topology.world) if error is not None), None)
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]  # no failure anywhere: result is this rank's


def of_first(topology: Topology, action: Callable[[], Result]) -> Result:
    """What `action` gives on the first rank, which alone runs it; on every rank. It must not communicate.

    Communicates: one all-gather of small objects over the world.
    Raises: the MegalmError of the first rank, on all; other exceptions pass as they are, being defects.
    """
    found: tuple[Result | None, MegalmError | None] = (None, None)
    if topology.world.is_first:
        try:
            found = (action(), None)
        except MegalmError as error:
            found = (None, error)
    result, failure = exchange(found, topology.world)[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]  # no failure: it is what the action gave

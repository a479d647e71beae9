"""One outcome on every rank: what one of them cannot do, none of them does."""

from __future__ import annotations

import torch
import torch.distributed

from megalm.errors import CheckpointError
from megalm.topology.agree import exchange
from megalm.topology.group import Group
from megalm.topology.topology import Topology


class AnyOf:
    """Whether each flag is set on any rank, asked without waiting for the ranks that are behind.

    Communicates: one all-reduce of a few integers over the world, in the background until `result` is called.
    """

    def __init__(self, flags: tuple[bool, ...], topology: Topology) -> None:
        self._counts = torch.tensor(flags, dtype=torch.int32, device=topology.device)
        self._work = None
        if topology.world.size > 1:
            self._work = torch.distributed.all_reduce(
                self._counts, op=torch.distributed.ReduceOp.MAX, group=topology.world.handle, async_op=True
            )

    def result(self) -> tuple[bool, ...]:
        """The answer, once every rank has asked."""
        if self._work is not None:
            self._work.wait()
        return tuple(bool(count) for count in self._counts.tolist())


def agree(failure: Exception | None, world: Group, *, doing: str) -> None:
    """Return on every rank if none has failed.

    Communicates: one all-gather of small objects over `world`.
    Raises: CheckpointError, the same on every rank, naming the ranks that failed and why.
    """
    report = None if failure is None else f"{type(failure).__name__}: {failure}"
    reports = exchange(report, world)
    failed = [(rank, text) for rank, text in enumerate(reports) if text is not None]
    if not failed:
        return
    lines = [f"  rank {world.ranks[rank]}: {text}" for rank, text in failed[:4]]
    if len(failed) > 4:
        lines.append(f"  and {len(failed) - 4} more ranks")
    raise CheckpointError("\n".join([f"{doing} failed on {len(failed)} of {world.size} ranks", *lines])) from failure

"""A set of ranks that communicate, as the rest of megalm sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Group:
    """One axis of the topology through this process.

    `rank` is the position in `ranks`, which lists global ranks in order. A group of size 1 has no handle, and whoever
    communicates over a group checks `size` first: code with SOLO runs without torch.distributed.
    """

    rank: int
    size: int
    handle: ProcessGroup | None
    ranks: tuple[int, ...]

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of the group."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this process is the last of the group."""
        return self.rank == self.size - 1


SOLO = Group(rank=0, size=1, handle=None, ranks=(0,))
"""This process alone."""

"""The process groups of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed

from megalm.topology.group import SOLO, Group
from megalm.topology.layout import Layout


@dataclass(frozen=True)
class Topology:
    """This process's place: one `Group` an axis, the group that holds one whole model, the world, and its device."""

    layout: Layout
    tp: Group
    pp: Group
    dp: Group
    model: Group
    world: Group
    local_rank: int
    device: torch.device

    @classmethod
    def solo(cls, device: torch.device | None = None) -> Topology:
        """One process, no torch.distributed."""
        return cls(Layout(1, 1, 1), SOLO, SOLO, SOLO, SOLO, SOLO, 0, device or torch.device("cpu"))

    @classmethod
    def build(cls, layout: Layout, *, rank: int, local_rank: int, device: torch.device) -> Topology:
        """Create every group. All ranks must call it at the same time: creating a group is collective."""
        return cls(
            layout=layout,
            tp=_own_group(layout.tp_groups(), rank),
            pp=_own_group(layout.pp_groups(), rank),
            dp=_own_group(layout.dp_groups(), rank),
            model=_own_group(layout.model_groups(), rank),
            world=_own_group([tuple(range(layout.world_size))], rank),
            local_rank=local_rank,
            device=device,
        )

    @property
    def reads_data(self) -> bool:
        """Whether this rank feeds batches: the first stage reads tokens, the last one labels."""
        return self.pp.is_first or self.pp.is_last

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world.size > 1:
            torch.distributed.barrier(self.world.handle)


def _own_group(groups: Iterable[tuple[int, ...]], rank: int) -> Group:
    """Create all groups of one axis, as torch.distributed requires of every rank, and keep the one with `rank`."""
    own = SOLO
    for ranks in groups:
        if len(ranks) == torch.distributed.get_world_size():
            handle = torch.distributed.group.WORLD
        elif len(ranks) > 1:
            handle = torch.distributed.new_group(list(ranks))
        else:
            handle = None
        if rank in ranks:
            own = Group(rank=ranks.index(rank), size=len(ranks), handle=handle, ranks=ranks)
    return own

"""The topology under the names that DeepSpeed calls: its `mpu` protocol."""

from __future__ import annotations

import torch.distributed
from torch.distributed import ProcessGroup

from megalm.topology.group import Group
from megalm.topology.topology import Topology


class Mpu:
    """Adapter for DeepSpeedEngine without a PipelineModule, which brings an adapter of its own.

    Every rank must construct it at the same time, since it may create groups: an axis of size 1 has no handle in
    `Topology`, but to torch.distributed no handle means the whole world, so here it gets a group of one.

    Source: the calls on `mpu` in DeepSpeed 0.19 (engine, ZeRO, groups); a test pins the names.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        alone = _group_of_one(topology.world)
        self._tp_handle = topology.tp.handle if topology.tp.size > 1 else alone
        self._dp_handle = topology.dp.handle if topology.dp.size > 1 else alone

    def get_model_parallel_rank(self) -> int:
        """Rank on the tensor axis: a model of one stage has no other axis."""
        return self._topology.tp.rank

    def get_model_parallel_world_size(self) -> int:
        """Size of the tensor axis."""
        return self._topology.tp.size

    def get_model_parallel_group(self) -> ProcessGroup | None:
        """Group of the tensor axis."""
        return self._tp_handle

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first tensor peer."""
        return self._topology.tp.ranks[0]

    def get_pipeline_model_parallel_rank(self) -> int:
        """Stage of this rank."""
        return self._topology.pp.rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Number of stages."""
        return self._topology.pp.size

    def get_data_parallel_rank(self) -> int:
        """Rank on the data axis."""
        return self._topology.dp.rank

    def get_data_parallel_world_size(self) -> int:
        """Size of the data axis."""
        return self._topology.dp.size

    def get_data_parallel_group(self) -> ProcessGroup | None:
        """Group of the data axis."""
        return self._dp_handle

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the data axis."""
        return list(self._topology.dp.ranks)


def _group_of_one(world: Group) -> ProcessGroup | None:
    """A group with this rank alone; every rank creates every group, as torch.distributed requires."""
    if world.size == 1:
        return torch.distributed.group.WORLD
    groups = [torch.distributed.new_group([rank]) for rank in range(world.size)]
    return groups[world.rank]

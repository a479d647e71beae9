"""Groups that the topology makes, on real ranks."""

from __future__ import annotations

import pickle

import pytest

from megalm.topology.start import Launch, allow_collectives, start
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist


def _sums_of_ranks(tp: int, pp: int) -> dict[str, tuple[float, tuple[int, ...]]]:
    import torch
    import torch.distributed

    topology = start(Launch.from_environment(), tp=tp, pp=pp)
    sums = {}
    for axis in ("tp", "pp", "dp", "model", "world"):
        group = getattr(topology, axis)
        value = torch.tensor(float(topology.world.rank))
        if group.size > 1:
            torch.distributed.all_reduce(value, group=group.handle)
        sums[axis] = (value.item(), group.ranks)
    return sums


def _deepspeed_axes(tp: int, pp: int, dp: int) -> dict[str, list[list[int]]]:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    axes = PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=dp)
    return {name: sorted(axes.get_axis_comm_lists(name)) for name in ("model", "pipe", "data")}


def _limits_of_groups() -> list[float]:
    """Minutes of the world, of a group that was there, and of one that came later."""
    import torch
    import torch.distributed

    topology = start(Launch.from_environment(), tp=2, pp=1)
    torch.distributed.barrier()
    allow_collectives(77.0)
    later = torch.distributed.new_group([0, 1])
    torch.distributed.barrier(later)
    groups = [topology.world.handle, topology.tp.handle, later]
    cpu = torch.device("cpu")
    return [group._get_backend(cpu).options._timeout.total_seconds() / 60.0 for group in groups]


def _lines_of_all(lists: list[list[str]]) -> tuple[list[str], int]:
    """What all would say, and the bytes that this rank would have gathered of every rank."""
    import torch.distributed

    from megalm.topology.agree import lines_of_all

    topology = start(Launch.from_environment(), tp=1, pp=1)
    gather, gathered = torch.distributed.all_gather_object, []

    def gather_object(values: list[object], value: object, **options: object) -> None:
        gathered.append(len(pickle.dumps(value)))
        gather(values, value, **options)

    torch.distributed.all_gather_object = gather_object
    return lines_of_all(lists[topology.world.rank], topology.world), sum(gathered)


@pytest.mark.parametrize("own", [[], ["of a host"], ["of a host", "of another host"]])
def test_lines_that_many_ranks_would_say_travel_once(own: list[str]) -> None:
    common = [f"corpus {number} was tokenized without an end of document" for number in range(500)]
    lists = [common] * 4
    for rank, line in zip((2, 1), own, strict=False):
        lists[rank] = [*common, line]
    for lines, num_bytes in run_ranks(_lines_of_all, 4, lists):
        assert sorted(lines) == sorted([*common, *own])
        assert num_bytes < 200


def test_the_limit_of_collectives_holds_for_groups_that_come_later() -> None:
    for limits in run_ranks(_limits_of_groups, 2):
        assert limits == [77.0, 77.0, 77.0]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_each_axis_reduces_over_its_own_ranks_only(tp: int, pp: int) -> None:
    for sums in run_ranks(_sums_of_ranks, 4, tp, pp):
        for total, ranks in sums.values():
            assert total == sum(ranks)


@pytest.mark.parametrize(("tp", "pp", "dp"), [(2, 2, 2), (4, 1, 3), (1, 5, 2), (3, 2, 4)])
def test_layout_has_the_axes_of_deepspeed(tp: int, pp: int, dp: int) -> None:
    from megalm.topology.layout import Layout

    layout = Layout(tp=tp, pp=pp, dp=dp)
    (theirs,) = run_ranks(_deepspeed_axes, 1, tp, pp, dp)
    ours = {"model": layout.tp_groups(), "pipe": layout.pp_groups(), "data": layout.dp_groups()}
    for axis, groups in ours.items():
        assert sorted(map(list, groups)) == theirs[axis] or len(groups[0]) == 1
    for rank in range(layout.world_size):
        t, p, d = layout.coordinates(rank)
        assert layout.rank(tp=t, pp=p, dp=d) == rank

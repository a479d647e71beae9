"""Layouts are obeyed or refused, never clamped."""

from __future__ import annotations

import pytest

from megalm.errors import TopologyError
from megalm.topology.layout import Layout


def test_the_data_axis_takes_what_remains() -> None:
    assert Layout.of_world(12, tp=2, pp=3) == Layout(tp=2, pp=3, dp=2)


@pytest.mark.parametrize(("tp", "pp"), [(3, 1), (2, 4), (8, 1), (0, 1)])
def test_sizes_that_do_not_divide_the_world_are_refused_with_those_that_do(tp: int, pp: int) -> None:
    with pytest.raises(TopologyError, match="products that fit: 1, 2, 4"):
        Layout.of_world(4, tp=tp, pp=pp)


def test_ranks_and_coordinates_are_inverse_and_groups_cover_the_world() -> None:
    layout = Layout(tp=2, pp=3, dp=4)
    for rank in range(layout.world_size):
        tp, pp, dp = layout.coordinates(rank)
        assert layout.rank(tp=tp, pp=pp, dp=dp) == rank
    for groups in (layout.tp_groups(), layout.pp_groups(), layout.dp_groups(), layout.model_groups()):
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))

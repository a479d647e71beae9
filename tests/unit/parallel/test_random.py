"""Random-number streams: where they agree, where they differ, and that a checkpoint continues them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megalm.parallel.random import RngStreams, derived_seed
from megalm.topology.group import Group


@pytest.fixture(autouse=True)
def _keep_the_default_stream() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def _streams(*, tp: int = 0, pp: int = 0, dp: int = 0, seed: int = 7) -> RngStreams:
    pair = (0, 1)
    return RngStreams(seed, tp=Group(tp, 2, None, pair), pp=Group(pp, 2, None, pair), dp=Group(dp, 2, None, pair))


def _draws(streams: RngStreams) -> tuple[torch.Tensor, torch.Tensor]:
    """The next numbers of the default and of the tensor-parallel stream; the last `_streams` is the active one."""
    default = torch.rand(4)
    with streams.tensor_parallel():
        tensor = torch.rand(4)
    return default, tensor


def test_default_stream_is_equal_over_tp_and_the_tensor_parallel_stream_differs() -> None:
    default_0, tensor_0 = _draws(_streams(tp=0))
    default_1, tensor_1 = _draws(_streams(tp=1))
    assert torch.equal(default_0, default_1)
    assert not torch.equal(tensor_0, tensor_1)


@pytest.mark.parametrize("axis", ["pp", "dp"])
def test_both_streams_differ_over_the_other_axes(axis: str) -> None:
    default_0, tensor_0 = _draws(_streams())
    default_1, tensor_1 = _draws(_streams(**{axis: 1}))
    assert not torch.equal(default_0, default_1)
    assert not torch.equal(tensor_0, tensor_1)


def test_seed_changes_both_streams() -> None:
    default_0, tensor_0 = _draws(_streams())
    default_1, tensor_1 = _draws(_streams(seed=8))
    assert not torch.equal(default_0, default_1)
    assert not torch.equal(tensor_0, tensor_1)


def test_tensor_parallel_draws_do_not_move_the_default_stream() -> None:
    streams = _streams()
    with streams.tensor_parallel():
        torch.rand(100)
    after = torch.rand(4)
    _streams()
    assert torch.equal(torch.rand(4), after)


def test_tensor_parallel_stream_goes_on_where_it_was() -> None:
    streams = _streams()
    with streams.tensor_parallel():
        whole = torch.rand(6)
    streams = _streams()
    parts = []
    for _ in range(2):
        with streams.tensor_parallel():
            parts.append(torch.rand(3))
    assert torch.equal(torch.cat(parts), whole)


def test_default_stream_comes_back_after_an_exception() -> None:
    streams = _streams()
    before = torch.get_rng_state()
    with pytest.raises(KeyError), streams.tensor_parallel():
        {}[torch.rand(3)]
    assert torch.equal(torch.get_rng_state(), before)


def test_loaded_state_continues_both_streams() -> None:
    streams = _streams()
    _draws(streams)
    state = streams.state_dict()
    expected = _draws(streams)
    other = _streams(seed=99)
    other.load_state_dict(state)
    for drawn, value in zip(_draws(other), expected, strict=True):
        assert torch.equal(drawn, value)


def test_derived_seeds_depend_on_every_part() -> None:
    seeds = {derived_seed(1, "a", 2), derived_seed(1, "a", 3), derived_seed(1, "b", 2), derived_seed(2, "a", 2)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)

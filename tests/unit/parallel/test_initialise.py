"""Initial weights depend on seed and name alone, not on how the weight is cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megalm.parallel import initialise as module
from megalm.parallel.initialise import Constant, Normal, Rule, initialise
from megalm.parallel.shard import mark_replicated, mark_sharded
from megalm.topology.group import SOLO, Group


def _filled(
    shape: tuple[int, ...], *, dim: int | None, tp: Group = SOLO, name: str = "w", seed: int = 1, num_threads: int = 1
) -> torch.Tensor:
    local = [size // tp.size if axis == dim else size for axis, size in enumerate(shape)]
    parameter = nn.Parameter(torch.empty(local))
    parameter = mark_replicated(parameter) if dim is None else mark_sharded(parameter, dim=dim)

    def rule(_: str) -> Rule:
        return Normal(0.5)

    initialise([(name, parameter)], seed=seed, tp=tp, rule=rule, num_threads=num_threads)
    return parameter.detach()


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Several blocks of rows to a weight, cut at rows that no shard boundary meets.
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 5 * 24)


@pytest.mark.parametrize("size", [2, 3, 4, 6])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_concatenate_to_the_whole_weight(size: int, dim: int) -> None:
    shards = [_filled((48, 24), dim=dim, tp=Group(rank, size, None, tuple(range(size)))) for rank in range(size)]
    assert torch.equal(torch.cat(shards, dim=dim), _filled((48, 24), dim=None))


def test_shards_of_a_vector_concatenate_to_the_whole_vector() -> None:
    shards = [_filled((240,), dim=0, tp=Group(rank, 4, None, (0, 1, 2, 3))) for rank in range(4)]
    assert torch.equal(torch.cat(shards), _filled((240,), dim=None))


def test_name_and_seed_both_change_the_values() -> None:
    first = _filled((48, 24), dim=None)
    assert not torch.equal(first, _filled((48, 24), dim=None, name="v"))
    assert not torch.equal(first, _filled((48, 24), dim=None, seed=2))


def test_values_are_normal_with_the_rule_s_deviation() -> None:
    values = _filled((480, 240), dim=None)
    # 115,200 draws: the mean's standard error is 0.0015, the deviation's 0.001; five of each.
    assert abs(values.mean().item()) < 0.0075
    assert abs(values.std().item() - 0.5) < 0.005


def test_blocks_of_one_weight_differ() -> None:
    values = _filled((10, 24), dim=None)
    assert not torch.equal(values[:5], values[5:])


def test_low_precision_weights_are_the_rounded_fp32_draw() -> None:
    parameter = mark_replicated(nn.Parameter(torch.empty(48, 24, dtype=torch.bfloat16)))
    initialise([("w", parameter)], seed=1, tp=SOLO, rule=lambda _: Normal(0.5))
    assert torch.equal(parameter, _filled((48, 24), dim=None).bfloat16())


def test_threads_draw_the_same_values() -> None:
    assert torch.equal(_filled((480, 24), dim=None, num_threads=4), _filled((480, 24), dim=None))


def test_default_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    _filled((48, 24), dim=None)
    assert torch.equal(torch.get_rng_state(), before)


def test_constant_fills() -> None:
    parameter = mark_replicated(nn.Parameter(torch.empty(3)))
    initialise([("b", parameter)], seed=1, tp=SOLO, rule=lambda _: Constant(1.0))
    assert torch.equal(parameter, torch.ones(3))

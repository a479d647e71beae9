"""Gradients on their way to fp32 sums: each is added once, vectors together, whatever the order they come in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megalm.kernels.gradient_sum.oracle import TorchGradientSum
from megalm.parallel.gradient_sum import gradient_sum_of, mark_adding
from megalm.topology.group import Group
from megalm.train import gradient_sums
from megalm.train.gradient_sums import GradientSums, take_over_sums


class CountingKernel(TorchGradientSum):
    """Counts the additions."""

    calls = 0

    def add_(self, total: torch.Tensor, gradient: torch.Tensor, *, factor: torch.Tensor | None = None) -> None:
        self.calls += 1
        super().add_(total, gradient, factor=factor)


def _owner() -> Any:
    """What GradientSums reads of a BF16_Optimizer: two matrices, three vectors, each group's sums flat and padded."""
    groups = [[nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5, 2))]]
    groups.append([nn.Parameter(torch.zeros(size)) for size in (4, 3, 2)])
    flat = [torch.zeros(24), torch.zeros(10)]
    sums = [list(torch.split(whole[:used], [p.numel() for p in group]))
            for whole, group, used in zip(flat, groups, (22, 9), strict=True)]  # fmt: skip
    return SimpleNamespace(
        bf16_groups=groups,
        fp32_groups_gradients=sums,
        fp32_groups_gradients_flat=flat,
        fp32_groups_has_gradients=[[False] * 2, [False] * 3],
        get_grads_for_reduction=lambda: flat,
        get_grads_for_norm=lambda for_clipping=False: (sums[0] + sums[1], {}),
        clear_lp_grads=lambda set_to_none: None,
        _global_grad_norm=None,
    )


def _give(sums: GradientSums, owner: Any, group: int, index: int, value: float) -> None:
    parameter = owner.bf16_groups[group][index]
    parameter.grad = torch.full_like(parameter, value)
    sums.add(parameter, group, index, False)
    parameter.grad = None  # as BF16_Optimizer does after each


def test_vectors_of_a_group_are_added_in_one_call_and_matrices_one_by_one() -> None:
    owner, kernel = _owner(), CountingKernel()
    sums = GradientSums(owner, kernel)
    for micro_batch in (1.0, 2.0):
        for index in (2, 0, 1):
            _give(sums, owner, 1, index, micro_batch * (index + 1))
        _give(sums, owner, 0, 1, micro_batch)
    assert kernel.calls == 2 * (1 + 1)
    assert owner.fp32_groups_gradients_flat[1].tolist() == [3.0] * 4 + [6.0] * 3 + [9.0] * 2 + [0.0]
    assert [total.tolist() for total in owner.fp32_groups_gradients[0]] == [[0.0] * 12, [3.0] * 10]
    assert all(parameter._hp_grad is not None for parameter in owner.bf16_groups[1])


def test_vectors_that_wait_are_added_before_anybody_reads_the_sums() -> None:
    owner = _owner()
    take_over_sums(owner, torch.optim.SGD(owner.bf16_groups[0], lr=1.0), TorchGradientSum())
    parameter = owner.bf16_groups[1][0]
    parameter.grad = torch.ones(4)
    owner._update_hp_grad(parameter, 1, 0, False)
    assert owner.get_grads_for_reduction()[1].tolist() == [1.0] * 4 + [0.0] * 6


def test_a_second_gradient_before_the_others_first_is_added_too() -> None:
    owner = _owner()
    sums = GradientSums(owner, TorchGradientSum())
    for value in (1.0, 2.0):
        _give(sums, owner, 1, 0, value)
    sums.add_waiting()
    assert owner.fp32_groups_gradients[1][0].tolist() == [3.0] * 4


def test_parameters_whose_users_add_are_told_where() -> None:
    owner = _owner()
    mark_adding(owner.bf16_groups[0][0])
    GradientSums(owner, TorchGradientSum())
    found = gradient_sum_of(owner.bf16_groups[0][0])
    assert found is not None
    found.add(torch.ones(3, 4, dtype=torch.bfloat16))
    assert owner.fp32_groups_gradients_flat[0][:12].tolist() == [1.0] * 12
    assert gradient_sum_of(owner.bf16_groups[0][1]) is None


def test_no_user_adds_where_a_sum_is_not_aligned() -> None:
    owner = _owner()
    owner.bf16_groups[0] = [mark_adding(nn.Parameter(torch.zeros(sizes))) for sizes in ((3, 4), (5, 2), (1, 2))]
    owner.fp32_groups_gradients[0] = list(torch.split(owner.fp32_groups_gradients_flat[0], [12, 10, 2]))
    sums = GradientSums(owner, TorchGradientSum())
    assert [gradient_sum_of(parameter) for parameter in owner.bf16_groups[0]] == [None] * 3
    _give(sums, owner, 0, 2, 1.0)
    assert owner.fp32_groups_gradients_flat[0].tolist() == [0.0] * 22 + [1.0] * 2


def test_the_norm_is_of_this_replica_s_part_of_the_parameters_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = _owner()
    left_out = owner.bf16_groups[0][1], owner.bf16_groups[1][0]
    monkeypatch.setattr(gradient_sums, "MOST_IN_A_NORM", 5)
    sums = [
        GradientSums(
            owner,
            TorchGradientSum(),
            replicas=Group(rank, 2, None, (0, 1)),
            counts=lambda parameter: not any(parameter is one for one in left_out),
        )
        for rank in range(2)
    ]
    for flat in owner.fp32_groups_gradients_flat:
        flat.copy_(torch.arange(1.0, 1.0 + flat.numel()))
    # 24 and 10 numbers, 12 and 5 for each: the first matrix is the first half, the last two vectors lie at 4 to 8.
    assert [[view.tolist() for view in one._counted] for one in sums] == [
        [[1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 10.0], [11.0, 12.0], [5.0]],
        [[6.0, 7.0, 8.0, 9.0]],
    ]


def test_the_norm_of_all_sums_is_measured_in_one_call() -> None:
    owner = _owner()
    take_over_sums(owner, torch.optim.SGD(owner.bf16_groups[0], lr=1.0), TorchGradientSum())
    generator = torch.Generator().manual_seed(0)
    for flat in owner.fp32_groups_gradients_flat:
        flat.copy_(torch.randn(flat.shape, generator=generator))
    (norms,), _ = owner.get_grads_for_norm()
    everything = torch.cat([*owner.fp32_groups_gradients[0], *owner.fp32_groups_gradients[1]])
    torch.testing.assert_close(norms.norm(), everything.norm(), rtol=1e-6, atol=0)
    assert len(owner.get_grads_for_norm(for_clipping=True)[0]) == 5

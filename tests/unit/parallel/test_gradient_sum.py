"""Parameters whose users add to an fp32 sum: the same gradients as autograd's, and none left for autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megalm.kernels.cross_entropy.torch_rows import TorchRows
from megalm.kernels.gradient_sum.oracle import TorchGradientSum
from megalm.kernels.linear.torch_native import TorchLinear
from megalm.parallel.embedding import VocabParallelEmbedding
from megalm.parallel.gradient_sum import GradientSum, give_gradient_sum
from megalm.parallel.head_loss import head_cross_entropy
from megalm.topology.group import SOLO, Group


def _table(seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(50, 12, generator=torch.Generator().manual_seed(seed)))


def _loss(embedding: VocabParallelEmbedding, *, view: bool) -> torch.Tensor:
    ids = torch.arange(18).view(9, 2) * 7 % 50
    x = embedding(ids).square()
    weight = embedding.weight.view_as(embedding.weight) if view else embedding.weight
    token_weights = torch.full((9, 2), 1 / 18)
    return head_cross_entropy(
        x, weight, ids.flip(0), token_weights, tp=SOLO, rows=TorchRows(), kernel=TorchLinear(), z_loss=1e-3
    )


@pytest.mark.parametrize("view", [False, True])
def test_tied_embedding_and_head_add_what_autograd_would(view: bool) -> None:
    ours, theirs = (VocabParallelEmbedding(50, 12, tp=SOLO) for _ in range(2))
    for module in (ours, theirs):
        module.weight.data.copy_(_table())
    (_loss(theirs, view=view) / 4).backward()
    total = torch.zeros(50, 12)
    give_gradient_sum(ours.weight, GradientSum(total, TorchGradientSum()))
    for _ in range(2):
        (_loss(ours, view=view) / 4).backward()
    assert ours.weight.grad is None
    # fp32 sums in another order, of terms below 1.
    torch.testing.assert_close(total, 2 * theirs.weight.grad, rtol=1e-5, atol=1e-7)


def test_ids_of_other_ranks_add_nothing() -> None:
    class OnlyHere(VocabParallelEmbedding):
        """Without the sum over ranks."""

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            from megalm.parallel.embedding import local_ids
            from megalm.parallel.gradient_sum import lookup

            local, elsewhere = local_ids(ids, self.num_embeddings, tp=self.tp)
            return lookup(local, self.weight, present=~elsewhere).masked_fill(elsewhere.unsqueeze(-1), 0.0)

    embedding = OnlyHere(100, 12, tp=Group(1, 2, None, (0, 1)))
    embedding.weight.data.copy_(_table())
    total = torch.zeros(50, 12)
    give_gradient_sum(embedding.weight, GradientSum(total, TorchGradientSum()))
    embedding(torch.tensor([3, 60, 99, 60])).sum().backward()
    expected = torch.zeros(50, 12)
    expected[10] = 2.0
    expected[49] = 1.0
    assert torch.equal(total, expected)


def test_evaluation_and_frozen_tables_leave_the_sum_alone() -> None:
    embedding = VocabParallelEmbedding(50, 12, tp=SOLO)
    embedding.weight.data.copy_(_table())
    total = torch.zeros(50, 12)
    give_gradient_sum(embedding.weight, GradientSum(total, TorchGradientSum()))
    with torch.no_grad():
        assert torch.isfinite(_loss(embedding, view=False))
    assert not total.any()

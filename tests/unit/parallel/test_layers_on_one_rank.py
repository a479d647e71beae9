"""Tensor-parallel layers on a group of one are torch's own layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megalm.parallel.cross_entropy import vocab_parallel_cross_entropy
from megalm.parallel.embedding import VocabParallelEmbedding, local_ids
from megalm.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megalm.topology.group import SOLO, Group


@pytest.mark.parametrize("layer_type", [ColumnParallelLinear, RowParallelLinear])
def test_linear_equals_torch_linear(layer_type: type[ColumnParallelLinear]) -> None:
    dense = nn.Linear(6, 8)
    layer = layer_type(6, 8, tp=SOLO)
    layer.load_state_dict(dense.state_dict())
    x = torch.randn(5, 3, 6)
    # Rows add the bias after the product, torch.addmm inside it: one rounding apart.
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer_type", [ColumnParallelLinear, RowParallelLinear])
def test_skipped_bias_plus_added_bias_is_the_whole_layer(layer_type: type[ColumnParallelLinear]) -> None:
    dense = nn.Linear(6, 8)
    layer = layer_type(6, 8, tp=SOLO, skip_bias_add=True)
    layer.load_state_dict(dense.state_dict())
    x = torch.randn(5, 3, 6)
    torch.testing.assert_close(layer(x) + layer.added_bias(), dense(x), rtol=1e-6, atol=1e-6)


def test_layer_without_bias_has_no_bias_parameter() -> None:
    assert list(ColumnParallelLinear(6, 8, tp=SOLO, bias=False).state_dict()) == ["weight"]


def test_embedding_equals_torch_embedding() -> None:
    dense = nn.Embedding(10, 4)
    layer = VocabParallelEmbedding(10, 4, tp=SOLO)
    layer.load_state_dict(dense.state_dict())
    ids = torch.randint(0, 10, (5, 3))
    assert torch.equal(layer(ids), dense(ids))


@pytest.mark.parametrize("foreign", [-1, 12])
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_id_outside_the_vocabulary_stays_out_of_range_on_every_rank(foreign: int, rank: int) -> None:
    local, elsewhere = local_ids(torch.tensor([foreign]), 12, tp=Group(rank, 4, None, (0, 1, 2, 3)))
    assert not elsewhere.item()
    with pytest.raises(IndexError):
        F.embedding(local, torch.zeros(3, 2))


def test_every_id_of_the_vocabulary_is_local_to_exactly_one_rank() -> None:
    ids = torch.arange(12)
    owners = torch.zeros(12, dtype=torch.long)
    for rank in range(4):
        local, elsewhere = local_ids(ids, 12, tp=Group(rank, 4, None, (0, 1, 2, 3)))
        assert torch.equal(local[~elsewhere], torch.arange(3))
        owners += ~elsewhere
    assert torch.equal(owners, torch.ones(12, dtype=torch.long))


def test_cross_entropy_equals_float64_reference_forward_and_grad() -> None:
    logits = (8 * torch.randn(7, 3, 50)).requires_grad_()
    labels = torch.randint(0, 50, (7, 3))
    upstream = torch.randn(7, 3)
    loss = vocab_parallel_cross_entropy(logits, labels, tp=SOLO)
    loss.backward(upstream)

    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").view(7, 3)
    expected.backward(upstream.double())
    # fp32 sums of 50 terms; losses reach 30 nats, whose ulp is 2e-6.
    torch.testing.assert_close(loss, expected.float(), rtol=2e-6, atol=4e-6)
    assert exact.grad is not None
    torch.testing.assert_close(logits.grad, exact.grad.float(), rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_bf16_logits_is_fp32_and_its_gradient_bf16() -> None:
    logits = torch.randn(4, 2, 33).bfloat16().requires_grad_()
    labels = torch.randint(0, 33, (4, 2))
    loss = vocab_parallel_cross_entropy(logits, labels, tp=SOLO)
    loss.sum().backward()
    exact = logits.detach().float().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").view(4, 2)
    expected.sum().backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert logits.grad is not None
    assert exact.grad is not None
    # One rounding to bf16: half an ulp is at most 2^-8 of the value.
    torch.testing.assert_close(logits.grad.float(), exact.grad, rtol=2**-8, atol=1e-6)


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    logits = torch.tensor([[[1e30, -1e30, 0.0]]], requires_grad=True)
    loss = vocab_parallel_cross_entropy(logits, torch.tensor([[0]]), tp=SOLO)
    loss.sum().backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_label_outside_the_vocabulary_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="index"):
        vocab_parallel_cross_entropy(torch.zeros(1, 1, 4), torch.tensor([[4]]), tp=SOLO)

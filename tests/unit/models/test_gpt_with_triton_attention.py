"""A BLOOM whose attention runs in Triton: on a GPU where there is one, in the interpreter elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megalm.kernels.attention import triton_launch
from megalm.kernels.attention.baddbmm import BaddbmmAttention
from megalm.kernels.attention.protocol import AttentionCore
from megalm.kernels.attention.triton_flash import TritonAttention
from megalm.kernels.attention.triton_launch import Blocks, Cut
from megalm.models.blocks.arrangement import Spread
from megalm.models.gpt.build import build_model, choose_kernels, plan_gpt
from megalm.models.gpt.plan import DocumentRules
from megalm.parallel.random import RngStreams
from megalm.topology.group import SOLO
from tests.support import triton_device as support
from tests.unit.models import small

TINY = Cut(Blocks(32, 16, 4, 2), Blocks(16, 16, 4, 2), Blocks(16, 32, 4, 2))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    if not support.INSTALLED:
        pytest.skip(support.ABSENT)
    if not support.ON_GPU:
        monkeypatch.setattr(triton_launch, "cut_for", lambda *_, **__: TINY)
    with support.triton_device() as device:
        yield device


def gradients(
    core: AttentionCore,
    device: torch.device,
    *,
    recompute: str = "none",
    dropout: float = 0.0,
    documents: DocumentRules | None = None,
) -> list[Tensor]:
    """The loss and the gradient of every weight."""
    model = small.bloom(num_layers=1, hidden_size=32, num_heads=2, attention_dropout=dropout)
    kernels, _ = choose_kernels(model, device=device)
    streams = RngStreams(3, tp=SOLO, pp=SOLO, dp=SOLO, device=device)
    plan = plan_gpt(
        model,
        kernels=replace(kernels, attention=core),
        spread=Spread(recompute=recompute, streams=streams),
        documents=documents,
    )
    module = build_model(plan, seed=0)
    small.randomise(module)
    module.to(device)
    tokens = torch.randint(0, 96, (2, 36), generator=torch.Generator().manual_seed(1)).to(device)
    tokens[0, [7, 8, 20]] = 0
    loss = module(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("documents", [None, DocumentRules(eod_id=0, reset_attention=True)], ids=["whole", "documents"])
def test_loss_and_gradients_equal_the_oracle_s(documents: DocumentRules | None, device: torch.device) -> None:
    results = [gradients(core, device, documents=documents) for core in (TritonAttention(), BaddbmmAttention())]
    for ours, expected in zip(*results, strict=True):
        # fp32 sums in another order, of gradients up to about 1.
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-6)


def test_documents_change_the_loss(device: torch.device) -> None:
    rules = DocumentRules(eod_id=0, reset_attention=True)
    assert gradients(TritonAttention(), device)[0] != gradients(TritonAttention(), device, documents=rules)[0]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_drops_the_same_weights(mode: str, device: torch.device) -> None:
    kept, again = (gradients(TritonAttention(), device, recompute=x, dropout=0.3) for x in ("none", mode))
    for first, second in zip(kept, again, strict=True):
        # On a GPU the embedding's gradient is summed by atomic additions, in no fixed order.
        torch.testing.assert_close(first, second, rtol=1e-4 if support.ON_GPU else 0.0, atol=1e-6 * support.ON_GPU)
    assert kept[0] != gradients(TritonAttention(), device)[0]

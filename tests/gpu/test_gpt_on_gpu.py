"""GPT and its random streams on a GPU."""

from __future__ import annotations

import pytest
import torch

from megalm.models.blocks.arrangement import Spread
from megalm.models.gpt.build import build_model, choose_kernels, plan_gpt
from megalm.parallel.random import RngStreams
from megalm.topology.group import SOLO
from tests.unit.models import small

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_fp32_logits_equal_the_cpu_s() -> None:
    model = small.bloom()
    ours = build_model(plan_gpt(model), seed=0).eval()
    small.randomise(ours)
    tokens = torch.randint(0, 96, (2, 16))
    expected = ours(tokens)
    kernels, _ = choose_kernels(model, device=torch.device("cuda"))
    there = build_model(plan_gpt(model, kernels=kernels), seed=0).eval()
    there.load_state_dict(ours.state_dict())
    # fp32 products without TF32, summed in another order, of logits of about 10.
    torch.testing.assert_close(there.cuda()(tokens.cuda()).cpu(), expected, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_draws_the_same_masks(mode: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    model = small.bloom(hidden_dropout=0.2, attention_dropout=0.3)
    kernels, _ = choose_kernels(model, device=device, attention="baddbmm")
    tokens = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(1)).to(device)
    results = []
    for recompute in ("none", mode):
        streams = RngStreams(3, tp=SOLO, pp=SOLO, dp=SOLO, device=device)
        module = build_model(
            plan_gpt(model, kernels=kernels, spread=Spread(recompute=recompute, streams=streams)), seed=0
        )
        small.randomise(module)
        module.to(device)
        loss = module(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in module.parameters())])
    for kept, again in zip(*results, strict=True):
        # The embedding's gradient is summed by atomic additions, in no fixed order.
        torch.testing.assert_close(kept, again, rtol=1e-4, atol=1e-6)


def test_loaded_state_continues_both_streams() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    streams = RngStreams(3, tp=SOLO, pp=SOLO, dp=SOLO, device=device)

    def draw() -> torch.Tensor:
        with streams.tensor_parallel():
            tensor = torch.rand(3, device=device)
        return torch.cat([torch.rand(3, device=device), tensor])

    draw()
    state = streams.state_dict()
    expected = draw()
    assert not torch.equal(expected, draw())
    streams.load_state_dict(state)
    assert torch.equal(draw(), expected)

"""GPT on one rank: loss, masks, documents, dropout, recomputation, precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.config.model import ModelConfig
from megalm.kernels.layer_norm import oracle
from megalm.models.blocks.arrangement import Spread
from megalm.models.blocks.block import leave_additions
from megalm.models.flops import matmul_parameters
from megalm.models.gpt.build import build_model, choose_kernels, plan_gpt
from megalm.models.gpt.loss import next_token_loss
from megalm.models.gpt.model import GPT
from megalm.models.gpt.plan import DocumentRules
from megalm.parallel.random import RngStreams
from megalm.topology.group import SOLO
from tests.unit.models import small

EOD = 95


@pytest.fixture(autouse=True)
def _keep_the_default_stream() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def _tokens(num: int = 17, *, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(0, 90, (batch, num), generator=torch.Generator().manual_seed(seed))


def _model(model: ModelConfig, *, spread: Spread | None = None, documents: DocumentRules | None = None) -> GPT:
    module = build_model(plan_gpt(model, spread=spread, documents=documents), seed=0)
    small.randomise(module)
    return module


def test_loss_is_the_masked_mean_of_the_logits_cross_entropy() -> None:
    module, tokens = _model(small.bloom()).eval(), _tokens()
    mask = (torch.arange(32).view(2, 16) % 3 != 0).float()
    logits = module(tokens[:, :-1])
    each = F.cross_entropy(logits.double().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(2, 16)
    expected = (each * mask).sum() / mask.sum()
    loss = module(tokens[:, :-1], tokens[:, 1:], mask)
    # A mean of fp32 losses of some 5 nats.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("model", [small.bloom(), small.gpt2(tie_embeddings=False)], ids=["tied", "untied"])
def test_fused_head_gives_the_loss_and_gradients_of_the_logits_in_full(model: ModelConfig) -> None:
    tokens, mask = _tokens(), (torch.arange(32).view(2, 16) % 3 != 0).float()
    results = []
    for head in ("reference", "chunked"):
        kernels, choices = choose_kernels(model, device=torch.device("cpu"), head=head)
        assert choices["head"].name == head
        module = build_model(plan_gpt(model, seq_length=16, kernels=kernels, z_loss=1e-2), seed=1)
        small.randomise(module)
        loss = module(tokens[:, :-1], tokens[:, 1:], mask)
        loss.backward()
        with torch.no_grad():
            evaluated = module(tokens[:, :-1], tokens[:, 1:], mask)
        # log(sum of exp) is at least log(96) for logits around 0, so the term is felt; evaluation leaves it out.
        assert loss - evaluated > 0.05
        results.append([loss.detach(), evaluated, *(parameter.grad for parameter in module.parameters())])
    for reference, fused in zip(*results, strict=True):
        # fp32 sums in another order, through two blocks.
        torch.testing.assert_close(fused, reference, rtol=1e-5, atol=1e-5 * reference.abs().max().item())


@pytest.mark.parametrize("gate", ["geglu", "swiglu", "reglu", "liglu"])
def test_gated_mlp_multiplies_values_by_their_activated_gates(gate: str) -> None:
    module = _model(small.bloom(glu_activation=gate, ffn_hidden_size=40))
    mlp, x = module.h[0].mlp, torch.randn(3, 2, 48, generator=torch.Generator().manual_seed(0))
    assert mlp.dense_h_to_4h.weight.shape == (80, 48)
    assert mlp.dense_4h_to_h.weight.shape == (48, 40)
    weight, bias = mlp.dense_h_to_4h.weight.detach(), mlp.dense_h_to_4h.bias.detach()
    value, gated = F.linear(x, weight[0::2], bias[0::2]), F.linear(x, weight[1::2], bias[1::2])
    act = {"geglu": F.gelu, "swiglu": F.silu, "reglu": F.relu, "liglu": lambda x: x}[gate]
    expected = F.linear(value * act(gated), mlp.dense_4h_to_h.weight)
    # fp32 products of 48 and 40 terms, in another order.
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)
    # Each of the two blocks has the gates' rows more.
    shapes = [small.bloom(ffn_hidden_size=40, glu_activation=glu) for glu in (gate, None)]
    assert matmul_parameters(shapes[0]) - matmul_parameters(shapes[1]) == 2 * 40 * 48


@pytest.mark.parametrize("drops", [False, True])
def test_block_uses_the_addition_fused_with_the_norm_unless_it_drops(drops: bool) -> None:
    config = small.bloom(hidden_dropout=0.1 if drops else 0.0)
    calls = []

    def fused(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(arguments)
        return oracle.add_layer_norm(*arguments)

    kernels, _ = choose_kernels(config, device=torch.device("cpu"))
    modules = [
        build_model(plan_gpt(config, kernels=replace(kernels, add_layer_norm=form)), seed=1) for form in (None, fused)
    ]
    tokens, losses = _tokens(), []
    for module in modules:
        torch.manual_seed(0)
        losses.append(module(tokens[:, :-1], tokens[:, 1:]))
        losses[-1].backward()
    assert len(calls) == (0 if drops else 2)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for ours, theirs in zip(*(module.parameters() for module in modules), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("recompute", "compiled"), [("none", False), ("none", True), ("selective", False), ("full", False)]
)
def test_a_block_leaves_its_addition_to_the_next_one(recompute: str, compiled: bool) -> None:
    torch._dynamo.reset()
    config = small.bloom(num_layers=3)
    calls = []

    def fused(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        return oracle.add_layer_norm(*arguments)

    kernels, _ = choose_kernels(config, device=torch.device("cpu"))
    plan = plan_gpt(config, kernels=replace(kernels, add_layer_norm=fused), spread=Spread(recompute=recompute))
    modules = [build_model(plan, seed=1) for _ in range(2)]
    leave_additions(list(modules[1].h))
    left = [block.leaves_addition for block in modules[1].h]
    assert left == ([True, True, False] if recompute != "full" else [False] * 3)
    tokens, losses = _tokens(), []
    for module in modules:
        if compiled:
            for block in module.h:
                block._compute = torch.compile(block._compute, dynamic=False, backend="aot_eager")
        losses.append(module(tokens[:, :-1], tokens[:, 1:]))
        losses[-1].backward()
    if not compiled and recompute != "full":
        assert len(calls) == 3 + 3 + 2
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for ours, theirs in zip(*(module.parameters() for module in modules), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_what_is_dropped_is_not_left_to_the_next_block() -> None:
    config = small.bloom(num_layers=2, hidden_dropout=0.1)
    kernels, _ = choose_kernels(config, device=torch.device("cpu"))
    plan = plan_gpt(config, kernels=replace(kernels, add_layer_norm=oracle.add_layer_norm))
    module = build_model(plan, seed=1)
    leave_additions(list(module.h))
    assert not any(block.leaves_addition for block in module.h)


def test_loss_without_a_mask_counts_every_token() -> None:
    module, tokens = _model(small.bloom()).eval(), _tokens()
    everything = module(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 16))
    assert torch.equal(module(tokens[:, :-1], tokens[:, 1:]), everything)


def test_loss_of_a_fully_masked_batch_is_zero_and_has_no_nan_gradient() -> None:
    logits = torch.randn(4, 2, 8, requires_grad=True)
    loss = next_token_loss(logits, torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 4), tp=SOLO)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("model", [small.bloom(), small.gpt2()], ids=["bloom", "gpt2"])
def test_logits_do_not_depend_on_later_tokens(model: ModelConfig) -> None:
    module, tokens = _model(model).eval(), _tokens()
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 90
    ours, other = module(tokens), module(changed)
    # Equal up to the order of sums over keys that weigh nothing.
    torch.testing.assert_close(ours[:, :10], other[:, :10], rtol=0.0, atol=1e-5)
    assert (ours[:, 10:] - other[:, 10:]).abs().max() > 0.1


@pytest.mark.parametrize("model", [small.bloom(), small.gpt2()], ids=["bloom", "gpt2"])
def test_reset_documents_are_computed_as_if_they_were_alone(model: ModelConfig) -> None:
    rules = DocumentRules(eod_id=EOD, reset_positions=True, reset_attention=True)
    module = _model(model, documents=rules).eval()
    tokens = _tokens(12, batch=1)
    tokens[0, 4] = EOD
    whole, first, second = module(tokens), module(tokens[:, :5]), module(tokens[:, 5:])
    # The same sums in kernels of other sizes.
    torch.testing.assert_close(whole, torch.cat([first, second], dim=1), rtol=0.0, atol=1e-5)
    assert (whole - _model(model).eval()(tokens)).abs().max() > 0.1, "without the rules documents see each other"


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_neither_loss_nor_gradients_with_dropout(mode: str) -> None:
    results = []
    for recompute in ("none", mode):
        streams = RngStreams(3, tp=SOLO, pp=SOLO, dp=SOLO)
        spread = Spread(recompute=recompute, streams=streams)
        module = _model(small.bloom(hidden_dropout=0.2, attention_dropout=0.3), spread=spread)
        tokens = _tokens()
        loss = module(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in module.parameters())])
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


def test_dropout_acts_in_training_alone() -> None:
    module, tokens = _model(small.bloom(hidden_dropout=0.2, attention_dropout=0.2)), _tokens()
    assert not torch.equal(module(tokens), module(tokens))
    module.eval()
    plain = _model(small.bloom()).eval()
    assert torch.equal(module(tokens), plain(tokens))


@pytest.mark.parametrize("changes", [{"hidden_dropout": 0.2}, {"attention_dropout": 0.2}])
def test_each_dropout_alone_changes_the_loss(changes: dict[str, float]) -> None:
    tokens = _tokens()
    assert not torch.equal(_model(small.bloom(**changes))(tokens), _model(small.bloom())(tokens))


def test_bf16_model_has_bf16_logits_near_the_fp32_ones_and_an_fp32_loss() -> None:
    module, tokens = _model(small.bloom()).eval(), _tokens()
    exact = module(tokens[:, :-1])
    half = module.bfloat16()
    logits = half(tokens[:, :-1])
    assert logits.dtype == torch.bfloat16
    assert half(tokens[:, :-1], tokens[:, 1:]).dtype == torch.float32
    # Two blocks of bf16 activations: a few per cent of the logits' spread.
    assert (logits.float() - exact).std() < 0.05 * exact.std()


def test_a_token_outside_the_vocabulary_is_an_error() -> None:
    with pytest.raises(IndexError):
        _model(small.bloom())(torch.tensor([[96]]))


def test_kernels_are_those_asked_for_and_erf_brings_its_own() -> None:
    device = torch.device("cpu")
    _, choices = choose_kernels(small.bloom(), device=device, attention="baddbmm")
    assert choices["attention"].name == "baddbmm"
    erf, _ = choose_kernels(small.gpt2(activation="gelu_erf"), device=device)
    x = torch.linspace(-3, 3, 24)
    torch.testing.assert_close(erf.bias_gelu(x, torch.zeros(24)), F.gelu(x), rtol=1e-6, atol=1e-7)


def test_learned_positions_without_a_length_are_refused() -> None:
    with pytest.raises(ValueError, match="seq_length"):
        plan_gpt(small.gpt2(max_position_embeddings=None))
    assert plan_gpt(small.gpt2(max_position_embeddings=None), seq_length=24).shape.num_positions == 24

"""What each rank runs for `test_parallel_layers` on whole models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megalm.config.model import ModelConfig
from megalm.models.blocks.arrangement import Spread
from megalm.models.gpt.build import build_model, plan_gpt
from megalm.models.gpt.model import GPT
from megalm.models.gpt.plan import DocumentRules
from megalm.models.gpt.weights import named_in_model
from megalm.parallel.random import RngStreams
from megalm.parallel.shard import partition_dim
from megalm.topology.group import SOLO, Group
from tests.dist.parallel_layer_cases import relative_difference

S, B, VOCAB = 12, 4, 64
BLOOM = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    position_embedding="alibi",
    embed_layernorm=True,
    pad_vocab_size_to=VOCAB,
    init_std=0.2,
)
GPT2 = ModelConfig(
    num_layers=2, hidden_size=32, num_heads=4, max_position_embeddings=16, pad_vocab_size_to=VOCAB, init_std=0.2
)
UNTIED = ModelConfig(
    num_layers=1,
    hidden_size=32,
    num_heads=4,
    ffn_hidden_size=48,
    max_position_embeddings=16,
    pad_vocab_size_to=VOCAB,
    tie_embeddings=False,
    activation="gelu_erf",
    init_std=0.2,
)
GATED = ModelConfig(
    num_layers=1,
    hidden_size=32,
    num_heads=4,
    ffn_hidden_size=48,
    position_embedding="alibi",
    pad_vocab_size_to=VOCAB,
    glu_activation="swiglu",
    init_std=0.2,
)
DOCUMENTS = DocumentRules(eod_id=0, reset_positions=True, reset_attention=True)


def run_model_cases(tp: Group) -> dict[str, float]:
    """All cases on this rank."""
    return {name: case(tp) for name, case in MODEL_CASES.items()}


def sharded_against_whole(
    tp: Group,
    model: ModelConfig,
    *,
    sequence_parallel: bool = False,
    recompute: str = "none",
    documents: DocumentRules | None = None,
) -> float:
    """Largest difference of logits, loss and any gradient from those of the same model on one rank."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (B, S + 1), generator=generator)
    tokens[:, ::5] = 0
    mask = (torch.rand(B, S, generator=generator) < 0.8).float()
    whole = build_model(plan_gpt(model, documents=documents), seed=3)
    spread = Spread(tp=tp, sequence_parallel=sequence_parallel, recompute=recompute)
    sharded = build_model(plan_gpt(model, spread=spread, documents=documents), seed=3)
    pairs = list(zip(*(_logits_and_loss(module, tokens, mask) for module in (sharded, whole)), strict=True))
    dense = dict(named_in_model(whole, whole.plan.shape))
    for name, parameter in named_in_model(sharded, sharded.plan.shape):
        grad, dense_grad, dim = parameter.grad, dense[name].grad, partition_dim(parameter)
        assert grad is not None, name
        assert dense_grad is not None, name
        pairs.append((grad, dense_grad if dim is None else dense_grad.chunk(tp.size, dim)[tp.rank]))
    return relative_difference(pairs)


def _logits_and_loss(module: GPT, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Leaves gradients behind."""
    logits = module(tokens[:, :-1]).detach()
    loss = module(tokens[:, :-1], tokens[:, 1:], mask)
    loss.backward()
    return logits, loss.detach()


def dropout_draws(tp: Group) -> tuple[list[float], list[float], list[float]]:
    """What this rank draws for hidden states, attention weights, and hidden states under sequence parallelism."""
    streams = RngStreams(9, tp=tp, pp=SOLO, dp=SOLO)
    plain = Spread(tp=tp, streams=streams)
    split = Spread(tp=tp, sequence_parallel=True, streams=streams)
    drawn = []
    for stream in (plain.hidden_stream(True), plain.tensor_stream(True), split.hidden_stream(True)):
        with stream:
            drawn.append(torch.rand(8).tolist())
    return drawn[0], drawn[1], drawn[2]


MODEL_CASES: dict[str, Callable[[Group], float]] = {
    "bloom": lambda tp: sharded_against_whole(tp, BLOOM),
    "bloom, sequence": lambda tp: sharded_against_whole(tp, BLOOM, sequence_parallel=True),
    "bloom, sequence, full recompute": lambda tp: sharded_against_whole(
        tp, BLOOM, sequence_parallel=True, recompute="full"
    ),
    "bloom, selective recompute": lambda tp: sharded_against_whole(tp, BLOOM, recompute="selective"),
    "bloom, sequence, activation recompute": lambda tp: sharded_against_whole(
        tp, BLOOM, sequence_parallel=True, recompute="activation"
    ),
    "gpt2": lambda tp: sharded_against_whole(tp, GPT2),
    "gpt2, sequence": lambda tp: sharded_against_whole(tp, GPT2, sequence_parallel=True),
    "gpt2, sequence, documents": lambda tp: sharded_against_whole(
        tp, GPT2, sequence_parallel=True, documents=DOCUMENTS
    ),
    "gated": lambda tp: sharded_against_whole(tp, GATED),
    "untied": lambda tp: sharded_against_whole(tp, UNTIED),
    "untied, sequence": lambda tp: sharded_against_whole(tp, UNTIED, sequence_parallel=True),
}

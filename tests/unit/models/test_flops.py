"""Parameter counts of the published models, and the two conventions of counting attention."""

from __future__ import annotations

import pytest

from megalm.config.model import ModelConfig
from megalm.models.flops import flops_per_token, matmul_parameters, parameter_count
from megalm.models.gpt.build import build_model, plan_gpt
from tests.unit.models import small


def _bloom(num_layers: int, hidden_size: int, num_heads: int) -> ModelConfig:
    return small.bloom(num_layers=num_layers, hidden_size=hidden_size, num_heads=num_heads, pad_vocab_size_to=250_880)


@pytest.mark.parametrize(
    "shape, published",
    [
        ((24, 1024, 16), 559_214_592),
        ((24, 1536, 16), 1_065_314_304),
        ((24, 2048, 16), 1_722_408_960),
        ((30, 2560, 32), 3_002_557_440),
        ((30, 4096, 32), 7_069_016_064),
        ((70, 14336, 112), 176_247_271_424),
    ],
)
def test_bloom_has_the_published_number_of_parameters(shape: tuple[int, int, int], published: int) -> None:
    assert parameter_count(_bloom(*shape)) == published


def test_gpt2_small_has_the_published_number_of_parameters() -> None:
    model = small.gpt2(
        num_layers=12, hidden_size=768, num_heads=12, max_position_embeddings=1024, pad_vocab_size_to=50_257
    )
    assert parameter_count(model) == 124_439_808


@pytest.mark.parametrize("model", [small.bloom(), small.gpt2(), small.gpt2(tie_embeddings=False)])
def test_count_is_that_of_the_built_model(model: ModelConfig) -> None:
    module = build_model(plan_gpt(model), seed=0)
    assert parameter_count(model) == sum(parameter.numel() for parameter in module.parameters())


def test_flops_count_matrices_and_half_of_attention() -> None:
    model = small.bloom(num_layers=3, hidden_size=8, num_heads=2, pad_vocab_size_to=100)
    matrices = 3 * 12 * 8 * 8 + 100 * 8
    assert matmul_parameters(model) == matrices
    assert flops_per_token(model, seq_length=5) == 6 * matrices + 6 * 3 * 5 * 8
    assert flops_per_token(model, seq_length=5, causal=False) == 6 * matrices + 12 * 3 * 5 * 8


def test_learned_positions_multiply_nothing() -> None:
    assert matmul_parameters(small.gpt2()) == matmul_parameters(small.gpt2(max_position_embeddings=4096))

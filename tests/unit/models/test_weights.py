"""Names that checkpoint files and Hugging Face read are pinned here."""

from __future__ import annotations

import pytest
import torch

from megalm.config.model import ModelConfig
from megalm.models.gpt.build import build_model, plan_gpt
from megalm.models.gpt.shape import gpt_shape
from megalm.models.gpt.weights import head_layer, initial_rule, named_in_model, weight_table
from megalm.parallel.initialise import Constant, Normal
from megalm.parallel.shard import partition_dim
from tests.unit.models import small


@pytest.mark.parametrize("model", [small.bloom(), small.gpt2(), small.gpt2(tie_embeddings=False)])
def test_table_lists_exactly_the_model_s_parameters(model: ModelConfig) -> None:
    module = build_model(plan_gpt(model), seed=0)
    table = {weight.name: (weight.shape, weight.partition_dim) for weight in weight_table(module.plan.shape)}
    found = {
        name: (tuple(parameter.shape), partition_dim(parameter))
        for name, parameter in named_in_model(module, module.plan.shape)
    }
    assert found == table


def test_bloom_names_files_and_keys_are_bigscience_s() -> None:
    table = weight_table(gpt_shape(small.bloom(num_layers=70)))
    places = {weight.name: (weight.layer, weight.key, weight.partition_dim) for weight in table}
    assert {weight.layer for weight in table} == {1, *range(3, 73), 74}
    assert places["word_embeddings.weight"] == (1, "word_embeddings.weight", 0)
    assert places["word_embeddings_layernorm.bias"] == (1, "word_embeddings.norm.bias", None)
    assert places["h.69.self_attention.query_key_value.weight"] == (72, "self_attention.query_key_value.weight", 0)
    assert places["h.0.self_attention.dense.weight"] == (3, "self_attention.dense.weight", 1)
    assert places["h.0.mlp.dense_4h_to_h.bias"] == (3, "mlp.dense_4h_to_h.bias", None)
    assert places["h.0.mlp.dense_h_to_4h.bias"] == (3, "mlp.dense_h_to_4h.bias", 0)
    assert places["ln_f.weight"] == (74, "weight", None)
    assert len(table) == 3 + 12 * 70 + 2


def test_layer_state_dicts_have_the_keys_of_the_table() -> None:
    module = build_model(plan_gpt(small.bloom()), seed=0)
    table = weight_table(module.plan.shape)
    assert list(module.embedding.state_dict()) == [weight.key for weight in table if weight.layer == 1]
    assert set(module.h[0].state_dict()) == {weight.key for weight in table if weight.layer == 3}
    assert set(module.ln_f.state_dict()) == {weight.key for weight in table if weight.layer == 6}


def test_only_an_untied_head_has_a_weight() -> None:
    tied, untied = gpt_shape(small.gpt2()), gpt_shape(small.gpt2(tie_embeddings=False))
    assert head_layer(tied) not in {weight.layer for weight in weight_table(tied)}
    assert weight_table(untied)[-1].layer == head_layer(untied) == 7


def test_initial_values_follow_gpt2() -> None:
    shape = gpt_shape(small.bloom(num_layers=8, init_std=0.02))
    assert initial_rule(shape, "h.3.self_attention.dense.weight") == Normal(0.02 / 4)
    assert initial_rule(shape, "h.3.mlp.dense_4h_to_h.weight") == Normal(0.02 / 4)
    for name in ("h.3.mlp.dense_h_to_4h.weight", "h.0.self_attention.query_key_value.weight", "word_embeddings.weight"):
        assert initial_rule(shape, name) == Normal(0.02)
    for name in ("ln_f.weight", "word_embeddings_layernorm.weight", "h.0.post_attention_layernorm.weight"):
        assert initial_rule(shape, name) == Constant(1.0)
    for name in ("ln_f.bias", "h.0.self_attention.dense.bias", "word_embeddings_layernorm.bias"):
        assert initial_rule(shape, name) == Constant(0.0)


def test_model_starts_with_the_rule_s_values() -> None:
    module = build_model(plan_gpt(small.bloom(init_std=0.5)), seed=4)
    for name, parameter in named_in_model(module, module.plan.shape):
        rule = initial_rule(module.plan.shape, name)
        if isinstance(rule, Constant):
            assert torch.equal(parameter, torch.full_like(parameter, rule.value)), name
        else:
            # The smallest matrix has 2,304 draws: the deviation's standard error is 1.5 %; five of them.
            assert abs(parameter.std().item() / rule.std - 1.0) < 0.075, name

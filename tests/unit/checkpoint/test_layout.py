from __future__ import annotations

import pytest

from megalm.checkpoint import layout
from megalm.config.model import ModelConfig
from megalm.models.gpt.shape import gpt_shape
from megalm.models.gpt.weights import EMBEDDING_LAYER, FIRST_BLOCK_LAYER, final_norm_layer


def test_names_of_bloom_176b_are_the_published_ones() -> None:
    bloom = gpt_shape(
        ModelConfig(num_layers=70, hidden_size=14_336, num_heads=112, pad_vocab_size_to=250_880), seq_length=1
    )
    assert layout.layer_file(EMBEDDING_LAYER, 0) == "layer_01-model_00-model_states.pt"
    assert layout.layer_file(FIRST_BLOCK_LAYER + 69, 3) == "layer_72-model_03-model_states.pt"
    assert layout.layer_file(final_norm_layer(bloom), 0) == "layer_74-model_00-model_states.pt"
    assert layout.optimizer_file(dp_rank=7, mp_rank=47, bf16=True) == ("bf16_zero_pp_rank_7_mp_rank_47_optim_states.pt")
    assert layout.model_file(layout.model_rank(pp_rank=2, tp_rank=1, tp_size=4)) == "mp_rank_09_model_states.pt"


def test_parsers_invert_the_names() -> None:
    assert layout.parse_step(layout.step_folder(95000)) == 95000
    assert layout.parse_layer_file(layout.layer_file(104, 11)) == (104, 11)
    assert layout.parse_model_file(layout.model_file(120)) == 120
    for bf16 in (False, True):
        assert layout.parse_optimizer_file(layout.optimizer_file(dp_rank=13, mp_rank=2, bf16=bf16)) == (13, 2)


@pytest.mark.parametrize("name", ["global_step5.tmp", "global_step5.old", "global_step", "global_stepx", "latest"])
def test_only_published_folders_have_a_step(name: str) -> None:
    assert layout.parse_step(name) is None

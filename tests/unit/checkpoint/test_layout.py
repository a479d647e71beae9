from __future__ import annotations

import pytest

from megalm.checkpoint import layout


def test_names_of_bloom_176b_are_the_published_ones() -> None:
    assert layout.layer_file(layout.EMBEDDING_INDEX, 0) == "layer_01-model_00-model_states.pt"
    assert layout.layer_file(layout.block_index(69), 3) == "layer_72-model_03-model_states.pt"
    assert layout.layer_file(layout.final_norm_index(70), 0) == "layer_74-model_00-model_states.pt"
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

"""Which of a checkpoint's files are opened for the optimizer state of a weight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megalm.checkpoint import layout
from megalm.checkpoint.merge import LayerFiles
from megalm.checkpoint.optimizer_files import LocalState, OptimizerFiles, StateReader
from megalm.config.model import ModelConfig
from megalm.models.gpt.shape import GPTShape, gpt_shape
from megalm.models.gpt.weights import FIRST_BLOCK_LAYER, Weight, weight_table

TP, STAGES, LAYERS = 2, 12, 70


def bloom(*, tied: bool) -> GPTShape:
    """As many layers as BLOOM-176B has, dealt as its run did: the ends have five blocks, the others six."""
    model = ModelConfig(
        num_layers=LAYERS, hidden_size=16, num_heads=2, vocab_size=64, position_embedding="alibi", tie_embeddings=tied
    )
    return gpt_shape(model, seq_length=8)


def stages_of(weight: Weight, shape: GPTShape) -> set[int]:
    block = weight.layer - FIRST_BLOCK_LAYER
    found = {0 if block < 0 else min(STAGES - 1, (block + 1) // 6)}
    if shape.tie_embeddings and weight.name == "word_embeddings.weight":
        found.add(STAGES - 1)
    return found


class Opened(OptimizerFiles):
    """Notes the ranks whose files it would open."""

    def __init__(self, layers: LayerFiles) -> None:
        super().__init__(layers)
        self.ranks: list[int] = []

    def _read_rank(self, mp_rank: int) -> Iterator[tuple[str, StateReader]]:
        self.ranks.append(mp_rank)
        shape = self._layers.shape
        for weight in weight_table(shape):
            if mp_rank // TP in stages_of(weight, shape):
                yield weight.name, lambda: LocalState({}, float(mp_rank))


@pytest.mark.parametrize("tied", [True, False])
def test_a_stage_opens_its_own_files_and_hardly_any_others(tmp_path: Path, tied: bool) -> None:
    shape = bloom(tied=tied)
    for weight in weight_table(shape):
        for rank in range(TP):
            (tmp_path / layout.layer_file(weight.layer, rank)).touch()
    for rank in range(TP * STAGES):
        (tmp_path / layout.model_file(rank)).touch()
    layers = LayerFiles(tmp_path, shape)
    for stage in range(STAGES):
        files = Opened(layers)
        own = [weight for weight in weight_table(shape) if stage in stages_of(weight, shape)]
        for weight in own:
            assert files.state(weight, 1).step == TP * min(stages_of(weight, shape)) + 1
        assert len(files.ranks) <= 3 + (stage == STAGES - 1)

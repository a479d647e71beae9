"""The numbers and formulas of one GPT, and its list of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megalm.config.model import ModelConfig
from megalm.models.blocks.arrangement import BlockShape


@dataclass(frozen=True)
class GPTShape:
    """Everything about a GPT that does not depend on how it is spread, with every default resolved."""

    num_layers: int
    block: BlockShape
    vocab_rows: int
    """Rows v of the word embedding, padding included."""
    num_positions: int | None
    """Rows of the learned position table; None with ALiBi."""
    embed_layernorm: bool
    tie_embeddings: bool
    activation: str
    glu_activation: str | None
    init_std: float

    @property
    def hidden_size(self) -> int:
        """Width h of the residual stream."""
        return self.block.hidden_size

    @property
    def output_init_std(self) -> float:
        """Initial standard deviation of the 2L projections into the residual stream."""
        return self.init_std / math.sqrt(2.0 * self.num_layers)


def gpt_shape(model: ModelConfig, *, seq_length: int | None = None) -> GPTShape:
    """The shape that the configuration describes.

    `seq_length` gives a learned position table its rows where model.max_position_embeddings does not.
    Raises: ValueError if the table has neither.
    """
    alibi = model.position_embedding == "alibi"
    num_positions = None if alibi else model.max_position_embeddings or seq_length
    if not alibi and num_positions is None:
        raise ValueError("a learned position table needs model.max_position_embeddings or seq_length")
    block = BlockShape(
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        ffn_size=model.ffn_size,
        layernorm_epsilon=model.layernorm_epsilon,
        alibi=alibi,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        gated=model.glu_activation is not None,
    )
    return GPTShape(
        num_layers=model.num_layers,
        block=block,
        vocab_rows=model.padded_vocab_size,
        num_positions=num_positions,
        embed_layernorm=model.embed_layernorm,
        tie_embeddings=model.tie_embeddings,
        activation=model.activation,
        glu_activation=model.glu_activation,
        init_std=model.init_std,
    )

"""How large a model is and how much arithmetic one token costs, from the configuration alone."""

from __future__ import annotations

from megalm.config.model import ModelConfig
from megalm.models.gpt.shape import gpt_shape
from megalm.models.gpt.weights import weight_table


def parameter_count(model: ModelConfig, *, seq_length: int | None = None) -> int:
    """Parameters of the model, padding rows included, a tied head not counted again.

    `seq_length` gives a learned position table its rows where model.max_position_embeddings does not.
    """
    return sum(weight.numel for weight in weight_table(gpt_shape(model, seq_length=seq_length)))


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that multiply every token, N_matmul: the blocks' four matrices and the head, tied or not.

    The embedding looks rows up and multiplies nothing.
    """
    h, f = model.hidden_size, model.ffn_size
    num_mlp_parts = 2 if model.glu_activation is None else 3  # A gated MLP's first product is twice as wide.
    return model.num_layers * (4 * h * h + num_mlp_parts * h * f) + model.padded_vocab_size * h


def flops_per_token(model: ModelConfig, *, seq_length: int, causal: bool = True) -> float:
    """Floating-point operations of forward and backward for one token, without recomputation.

    6 N_matmul, and for the two products of attention 6 L s h where the causal half is counted, 12 L s h where the whole
    square is (causal=False).
    """
    attention = 12.0 * model.num_layers * seq_length * model.hidden_size
    return 6.0 * matmul_parameters(model) + (attention / 2.0 if causal else attention)

"""What is trained: the shape and the formulas of the model, nothing about how it is spread or fed."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.option import option

POSITION_EMBEDDINGS = ("alibi", "learned")
ACTIVATIONS = ("gelu_tanh", "gelu_erf")
GLU_ACTIVATIONS = ("geglu", "swiglu", "reglu", "liglu")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a GPT-family model. Defaults are GPT-2's formulas; `configs/bloom` overrides them with BLOOM's."""

    num_layers: int = option(doc="Transformer blocks.")
    hidden_size: int = option(doc="Width h of the residual stream.")
    num_heads: int = option(doc="Attention heads; must divide hidden_size.")
    ffn_hidden_size: int | None = option(None, doc="Width f of the MLP; 4 * hidden_size when not given.")
    max_position_embeddings: int | None = option(
        None, doc="Rows of the learned position table, in tokens; seq_length when not given. ALiBi has no table."
    )
    position_embedding: str = option(
        "learned",
        doc="How positions enter: added to the embedding, or as ALiBi's distances.",
        choices=POSITION_EMBEDDINGS,
    )
    embed_layernorm: bool = option(False, doc="LayerNorm right after the word embedding, as BLOOM has it.")
    activation: str = option(
        "gelu_tanh", doc="GELU by tanh (fused with the bias) or by erf (--no-bias-gelu-fusion).", choices=ACTIVATIONS
    )
    glu_activation: str | None = option(
        None,
        doc="A gated MLP in place of activation: value * act(gate), with act the erf GELU (geglu), SiLU (swiglu), ReLU "
        "(reglu) or nothing (liglu). dense_h_to_4h then has 2f rows, in pairs of value and gate.",
        choices=GLU_ACTIVATIONS,
    )
    tie_embeddings: bool = option(True, doc="The head shares the weight of the word embedding.")
    layernorm_epsilon: float = option(1e-5, doc="Added to the variance in every LayerNorm.")
    hidden_dropout: float = option(0.0, doc="Probability of dropping an element of a block's branch output.")
    attention_dropout: float = option(0.0, doc="Probability of dropping an attention weight.")
    init_std: float = option(
        0.02,
        doc="Standard deviation of initial weights; projections into the residual use init_std / sqrt(2 * num_layers).",
    )
    vocab_size: int | None = option(
        None, doc="Tokens of the vocabulary before padding; the tokenizer's when not given."
    )
    pad_vocab_size_to: int | None = option(None, doc="Rows of the word embedding, padding included.")
    make_vocab_size_divisible_by: int = option(
        128,
        doc="Padding multiple of the word embedding when pad_vocab_size_to is not given; independent of the layout.",
    )

    @property
    def head_size(self) -> int:
        """Elements of one attention head, d = h / n."""
        return self.hidden_size // self.num_heads

    @property
    def ffn_size(self) -> int:
        """Width f of the MLP."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows v of the word embedding. Needs vocab_size, or pad_vocab_size_to."""
        if self.pad_vocab_size_to is not None:
            return self.pad_vocab_size_to
        if self.vocab_size is None:
            raise ValueError("padded_vocab_size needs vocab_size or pad_vocab_size_to")
        multiple = self.make_vocab_size_divisible_by
        return (self.vocab_size + multiple - 1) // multiple * multiple

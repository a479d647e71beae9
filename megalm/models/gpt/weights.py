"""Every weight of a GPT under its names: in the run, in checkpoint files, in Hugging Face's Bloom and GPT-2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from megalm.models.gpt.shape import GPTShape
from megalm.parallel.initialise import Constant, Normal, Rule

EMBEDDING_LAYER = 1
FIRST_BLOCK_LAYER = 3
TIED_KEY = "embed"


@dataclass(frozen=True)
class Weight:
    """One weight of the whole model."""

    name: str
    """Layout-independent name: that of Hugging Face's BloomModel, which has no prefix."""
    layer: int
    """Position in the list of pipeline layers, which is the number in the checkpoint file's name."""
    key: str
    """Key in that file, and name inside that layer's module."""
    shape: tuple[int, ...]
    """Whole, not a shard's."""
    partition_dim: int | None
    """Shards over tensor ranks concatenate along this dimension; None: every rank holds the whole."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        product = 1
        for size in self.shape:
            product *= size
        return product

    def shard_shape(self, tp_size: int) -> tuple[int, ...]:
        """Sizes of what one of `tp_size` tensor ranks holds."""
        return tuple(size // tp_size if dim == self.partition_dim else size for dim, size in enumerate(self.shape))


def final_norm_layer(shape: GPTShape) -> int:
    """Position of the final LayerNorm."""
    return FIRST_BLOCK_LAYER + shape.num_layers + 1


def head_layer(shape: GPTShape) -> int:
    """Position of the head; a tied head has no file."""
    return final_norm_layer(shape) + 1


def weight_table(shape: GPTShape) -> tuple[Weight, ...]:
    """All weights, in the order of the layers; a tied head is the word embedding and does not appear again."""
    h = shape.hidden_size
    table = [Weight("word_embeddings.weight", EMBEDDING_LAYER, "word_embeddings.weight", (shape.vocab_rows, h), 0)]
    if shape.embed_layernorm:
        for kind in ("weight", "bias"):
            key = f"word_embeddings.norm.{kind}"
            table.append(Weight(f"word_embeddings_layernorm.{kind}", EMBEDDING_LAYER, key, (h,), None))
    if shape.num_positions is not None:
        name = "position_embeddings.weight"
        table.append(Weight(name, EMBEDDING_LAYER, name, (shape.num_positions, h), None))
    for block in range(shape.num_layers):
        for key, size, dim in _block_weights(shape):
            table.append(Weight(f"h.{block}.{key}", FIRST_BLOCK_LAYER + block, key, size, dim))
    final_norm = final_norm_layer(shape)
    table += [Weight(f"ln_f.{kind}", final_norm, kind, (h,), None) for kind in ("weight", "bias")]
    if not shape.tie_embeddings:
        table.append(Weight("lm_head.weight", head_layer(shape), "weight", (shape.vocab_rows, h), 0))
    return tuple(table)


def _block_weights(shape: GPTShape) -> list[tuple[str, tuple[int, ...], int | None]]:
    h, f, f_in = shape.hidden_size, shape.block.ffn_size, shape.block.ffn_inputs
    return [
        ("input_layernorm.weight", (h,), None),
        ("input_layernorm.bias", (h,), None),
        ("self_attention.query_key_value.weight", (3 * h, h), 0),
        ("self_attention.query_key_value.bias", (3 * h,), 0),
        ("self_attention.dense.weight", (h, h), 1),
        ("self_attention.dense.bias", (h,), None),
        ("post_attention_layernorm.weight", (h,), None),
        ("post_attention_layernorm.bias", (h,), None),
        ("mlp.dense_h_to_4h.weight", (f_in, h), 0),
        ("mlp.dense_h_to_4h.bias", (f_in,), 0),
        ("mlp.dense_4h_to_h.weight", (h, f), 1),
        ("mlp.dense_4h_to_h.bias", (h,), None),
    ]


def initial_rule(shape: GPTShape, name: str) -> Rule:
    """How the weight of this layout-independent name starts.

    Source: Radford et al. 2019, sec. 2.3: projections into the residual stream shrink with the number of layers.
    """
    if name.endswith(".bias"):
        return Constant(0.0)
    if "layernorm" in name or name.startswith("ln_f"):
        return Constant(1.0)
    if name.endswith((".self_attention.dense.weight", ".mlp.dense_4h_to_h.weight")):
        return Normal(shape.output_init_std)
    return Normal(shape.init_std)


def named_in_pipeline(module: nn.Module, shape: GPTShape) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of one pipeline stage under their layout-independent names.

    DeepSpeed registers layer i as `i` and a tied module as `tied_modules.<key>`.
    """
    names = {(weight.layer, weight.key): weight.name for weight in weight_table(shape)}
    tied = f"tied_modules.{TIED_KEY}."
    for local, parameter in module.named_parameters():
        if local.startswith(tied):
            yield names[EMBEDDING_LAYER, local.removeprefix(tied)], parameter
        else:
            layer, key = local.split(".", 1)
            yield names[int(layer), key], parameter


def named_in_model(module: nn.Module, shape: GPTShape) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a single-stage `GPT` under their layout-independent names."""
    names = {f"embedding.{w.key}": w.name for w in weight_table(shape) if w.layer == EMBEDDING_LAYER}
    for local, parameter in module.named_parameters():
        yield names.get(local, local), parameter

"""GPT as Hugging Face names it: which of its families can express a model, its configuration, its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megalm.errors import CheckpointError
from megalm.models.gpt.shape import GPTShape
from megalm.models.gpt.weights import Weight

BLOOM = "bloom"
GPT2 = "gpt2"


def family_of(shape: GPTShape) -> str:
    """The Hugging Face model type that computes the same function.

    Raises: CheckpointError that names every flag in the way.
    """
    alibi = shape.block.alibi
    obstacles = []
    if shape.glu_activation is not None:
        obstacles.append(f"{shape.glu_activation}: Bloom and GPT-2 have no gate (--glu-activation)")
    elif not alibi and not shape.embed_layernorm:
        return GPT2
    if not alibi:
        obstacles.append(
            "learned positions with an embedding LayerNorm: Bloom has ALiBi, GPT-2 has no embedding LayerNorm "
            "(--position-embedding-type, --embed-layernorm)"
        )
    if not shape.embed_layernorm:
        obstacles.append("no embedding LayerNorm: Bloom always has one (--embed-layernorm)")
    if shape.activation != "gelu_tanh":
        obstacles.append("erf GELU: Bloom has the tanh one (--no-bias-gelu-fusion)")
    if not shape.tie_embeddings:
        obstacles.append("untied head: Bloom's is the word embedding (model.tie_embeddings)")
    if shape.block.ffn_size != 4 * shape.hidden_size:
        obstacles.append(f"ffn of {shape.block.ffn_size}: Bloom's is 4 * {shape.hidden_size} (--ffn-hidden-size)")
    if obstacles:
        lines = "\n".join(f"  {obstacle}" for obstacle in obstacles)
        raise CheckpointError(f"no Hugging Face model computes what this one does\n{lines}")
    return BLOOM


def model_config(
    shape: GPTShape, *, family: str, dtype: str, eod_id: int | None, seq_length: int | None
) -> dict[str, Any]:
    """The content of config.json. `dtype` is "float32", "bfloat16" or "float16".

    The end of document begins, ends and pads, as long as nothing is known of other tokens.
    """
    block = shape.block
    ids = {"bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": eod_id}
    if family == BLOOM:
        return {
            "architectures": ["BloomForCausalLM"],
            "model_type": "bloom",
            "vocab_size": shape.vocab_rows,
            "hidden_size": shape.hidden_size,
            "n_layer": shape.num_layers,
            "n_head": block.num_heads,
            "layer_norm_epsilon": block.layernorm_epsilon,
            "initializer_range": shape.init_std,
            "hidden_dropout": block.hidden_dropout,
            "attention_dropout": block.attention_dropout,
            "apply_residual_connection_post_layernorm": False,
            "pretraining_tp": 1,
            "slow_but_exact": False,
            "seq_length": seq_length,
            "tie_word_embeddings": True,
            "use_cache": True,
            "torch_dtype": dtype,
            **ids,
        }
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": shape.vocab_rows,
        "n_positions": shape.num_positions,
        "n_ctx": shape.num_positions,
        "n_embd": shape.hidden_size,
        "n_layer": shape.num_layers,
        "n_head": block.num_heads,
        "n_inner": block.ffn_size,
        "activation_function": "gelu_new" if shape.activation == "gelu_tanh" else "gelu",
        "layer_norm_epsilon": block.layernorm_epsilon,
        "initializer_range": shape.init_std,
        "resid_pdrop": block.hidden_dropout,
        "embd_pdrop": block.hidden_dropout,
        "attn_pdrop": block.attention_dropout,
        "scale_attn_weights": True,
        "tie_word_embeddings": shape.tie_embeddings,
        "use_cache": True,
        "torch_dtype": dtype,
        **ids,
    }


@dataclass(frozen=True)
class Renamed:
    """A weight under its Hugging Face name, and the way there and back for its values."""

    name: str
    shape: tuple[int, ...]
    to_hf: Callable[[Tensor], Tensor]
    from_hf: Callable[[Tensor], Tensor]


def renamed(weight: Weight, shape: GPTShape, *, family: str) -> Renamed:
    """The Hugging Face form of one weight of the causal language model."""
    if family == BLOOM:
        return Renamed(f"transformer.{weight.name}", weight.shape, unchanged, unchanged)
    if weight.layer == 1 or weight.name in ("lm_head.weight", "ln_f.weight", "ln_f.bias"):
        return Renamed(_GPT2_OUTER[weight.name], weight.shape, unchanged, unchanged)
    _, block, key = weight.name.split(".", 2)
    module, kind = key.rsplit(".", 1)
    name = f"transformer.h.{block}.{_GPT2_INNER[module]}.{kind}"
    if module == "self_attention.query_key_value":
        return _fused_qkv(name, weight, shape)
    if len(weight.shape) == 2:
        return Renamed(name, (weight.shape[1], weight.shape[0]), _transposed, _transposed)
    return Renamed(name, weight.shape, unchanged, unchanged)


_GPT2_OUTER = {
    "word_embeddings.weight": "transformer.wte.weight",
    "position_embeddings.weight": "transformer.wpe.weight",
    "ln_f.weight": "transformer.ln_f.weight",
    "ln_f.bias": "transformer.ln_f.bias",
    "lm_head.weight": "lm_head.weight",
}
_GPT2_INNER = {
    "input_layernorm": "ln_1",
    "self_attention.query_key_value": "attn.c_attn",
    "self_attention.dense": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.dense_h_to_4h": "mlp.c_fc",
    "mlp.dense_4h_to_h": "mlp.c_proj",
}


def _fused_qkv(name: str, weight: Weight, shape: GPTShape) -> Renamed:
    """Rows are (heads, 3, head_dim) here and (3, heads, head_dim) in GPT-2, whose matrices are transposed too."""
    heads, size = shape.block.num_heads, shape.block.head_size
    rest = weight.shape[1:]

    def to_hf(tensor: Tensor) -> Tensor:
        rows = tensor.view(heads, 3, size, *rest).transpose(0, 1).reshape(3 * heads * size, *rest)
        return rows.t() if rest else rows

    def from_hf(tensor: Tensor) -> Tensor:
        rows = tensor.t() if rest else tensor
        return rows.reshape(3, heads, size, *rest).transpose(0, 1).reshape(3 * heads * size, *rest)

    return Renamed(name, (*rest, weight.shape[0]), to_hf, from_hf)


def unchanged(tensor: Tensor) -> Tensor:
    """The values as they are: nothing is renamed but the name."""
    return tensor


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.t()

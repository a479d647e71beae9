"""What every module of a model is told: its sizes, its kernels, and how it is spread over ranks."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass

from megalm.kernels.attention.protocol import AttentionCore
from megalm.kernels.bias_gelu.protocol import BiasGeluKernel
from megalm.kernels.cross_entropy.protocol import VocabularyRows
from megalm.kernels.dropout_add.oracle import bias_dropout_add
from megalm.kernels.dropout_add.protocol import BiasDropoutAddKernel
from megalm.kernels.layer_norm.protocol import AddLayerNormKernel, LayerNormAndPassKernel, LayerNormKernel
from megalm.kernels.linear.protocol import LinearKernel
from megalm.parallel.random import RngStreams
from megalm.topology.group import SOLO, Group


@dataclass(frozen=True)
class BlockShape:
    """Sizes and constants of one transformer block."""

    hidden_size: int
    num_heads: int
    ffn_size: int
    layernorm_epsilon: float
    alibi: bool
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    gated: bool = False
    """Whether the MLP's first product has a value and a gate for each of its f features."""

    @property
    def ffn_inputs(self) -> int:
        """Features of the MLP's first product, f or 2f."""
        return 2 * self.ffn_size if self.gated else self.ffn_size

    @property
    def head_size(self) -> int:
        """Elements of one attention head, d."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Kernels:
    """The implementation of each operation that has several."""

    attention: AttentionCore
    layer_norm: LayerNormKernel
    bias_gelu: BiasGeluKernel
    linear: LinearKernel
    head_linear: LinearKernel
    """The product with the vocabulary; 8-bit formats stay out of it."""
    dropout_add: BiasDropoutAddKernel = bias_dropout_add
    add_layer_norm: AddLayerNormKernel | None = None
    """The addition to the residual stream and the LayerNorm after it in one; None takes them one by one."""
    layer_norm_and_pass: LayerNormAndPassKernel | None = None
    """The LayerNorm beside the residual stream whose backward adds both gradients; None leaves that to autograd."""
    gelu_linear: str | None = None
    """The `GeluLinearKernel` that has the GELU inside the MLP's products; None takes them one by one."""
    head: VocabularyRows | None = None
    """Fuses the head with the loss; None computes the logits of all tokens first."""


@dataclass(frozen=True)
class Spread:
    """How a module is spread over tensor-parallel ranks, and what it computes twice."""

    tp: Group = SOLO
    sequence_parallel: bool = False
    recompute: str = "none"
    streams: RngStreams | None = None
    """None where nothing is dropped, or on a single rank whose default stream serves all."""

    @property
    def splits_sequence(self) -> bool:
        """Whether activations between the tensor-parallel layers are [s/t, b, h]."""
        return self.sequence_parallel and self.tp.size > 1

    def tensor_stream(self, draws: bool) -> AbstractContextManager[None]:
        """Random numbers that differ over tp, for activations that do; nothing is swapped if none are drawn."""
        return self.streams.tensor_parallel() if draws and self.streams is not None else contextlib.nullcontext()

    def hidden_stream(self, draws: bool) -> AbstractContextManager[None]:
        """Random numbers for activations between tensor-parallel layers, which differ over tp if positions do."""
        return self.tensor_stream(draws and self.splits_sequence)

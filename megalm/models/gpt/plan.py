"""What a GPT is built from; its two assemblies, `model` and `pipeline`, read the same plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megalm.models.blocks.arrangement import Kernels, Spread
from megalm.models.blocks.positions import absolute_positions, document_positions
from megalm.models.gpt.shape import GPTShape


@dataclass(frozen=True)
class DocumentRules:
    """What ends with a document, inside a sample that holds several."""

    eod_id: int
    """Token that ends a document and still belongs to it."""
    reset_positions: bool = False
    reset_attention: bool = False


@dataclass(frozen=True)
class GPTPlan:
    """Shape, kernels and spread of one model."""

    shape: GPTShape
    kernels: Kernels
    spread: Spread
    documents: DocumentRules | None = None
    z_loss: float = 0.0
    """Weight of log(sum of exp(logits))^2 in the training loss."""

    @property
    def reset_attention(self) -> bool:
        """Whether tokens attend within their document alone."""
        return self.documents is not None and self.documents.reset_attention

    def positions(self, tokens: Tensor) -> Tensor:
        """Positions of the tokens in the learned table. Shapes: tokens [s, b] -> [s, 1], or [s, b] if they restart."""
        if self.documents is not None and self.documents.reset_positions:
            return document_positions(tokens, self.documents.eod_id)
        return absolute_positions(tokens)

    def embedding_arguments(self) -> dict[str, Any]:
        """Arguments of `GPTEmbedding`."""
        shape = self.shape
        return {
            "vocab_rows": shape.vocab_rows,
            "hidden_size": shape.hidden_size,
            "num_positions": shape.num_positions,
            "norm_epsilon": shape.block.layernorm_epsilon if shape.embed_layernorm else None,
            "dropout": shape.block.hidden_dropout,
            "kernels": self.kernels,
            "spread": self.spread,
        }

    def block_arguments(self) -> dict[str, Any]:
        """Arguments of `ParallelTransformerLayer`."""
        return {"shape": self.shape.block, "kernels": self.kernels, "spread": self.spread}

    def final_norm_arguments(self) -> dict[str, Any]:
        """Arguments of the last `LayerNorm`."""
        return {
            "hidden_size": self.shape.hidden_size,
            "epsilon": self.shape.block.layernorm_epsilon,
            "kernels": self.kernels,
            "spread": self.spread,
        }

    def head_arguments(self) -> dict[str, Any]:
        """Arguments of `OutputEmbedding` and of `TiedEmbeddingHead`."""
        return {
            "vocab_rows": self.shape.vocab_rows,
            "hidden_size": self.shape.hidden_size,
            "kernels": self.kernels,
            "spread": self.spread,
        }

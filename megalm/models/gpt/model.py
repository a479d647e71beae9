"""GPT in one piece: the readable assembly, for one stage, tests, generation and the check of exports."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalm.models.blocks.block import ParallelTransformerLayer
from megalm.models.blocks.embedding import GPTEmbedding
from megalm.models.blocks.head import HeadInput, OutputEmbedding, vocabulary_logits
from megalm.models.blocks.norm import LayerNorm
from megalm.models.blocks.positions import document_starts
from megalm.models.gpt.loss import fused_next_token_loss, next_token_loss
from megalm.models.gpt.plan import GPTPlan
from megalm.parallel.collectives import gather_from


class GPT(nn.Module):
    """Embedding, blocks, final LayerNorm, head. `models.gpt.pipeline` deals the same modules to stages.

    Parameters have no values until `models.gpt.build` or a checkpoint gives them.
    """

    def __init__(self, plan: GPTPlan) -> None:
        super().__init__()
        self.plan = plan
        self.embedding = GPTEmbedding(**plan.embedding_arguments())
        self.h = nn.ModuleList(ParallelTransformerLayer(**plan.block_arguments()) for _ in range(plan.shape.num_layers))
        self.ln_f = LayerNorm(**plan.final_norm_arguments())
        self.lm_head = None if plan.shape.tie_embeddings else OutputEmbedding(**plan.head_arguments())

    def forward(self, tokens: Tensor, labels: Tensor | None = None, loss_mask: Tensor | None = None) -> Tensor:
        """The loss where there are labels, otherwise the logits of the whole vocabulary.

        Shapes: tokens [b, s], labels [b, s], loss_mask [b, s] (all count when not given) -> scalar, or [b, s, v].
        Communicates: without labels, an all-gather of the logits over tp.
        """
        plan = self.plan
        if labels is None:
            return gather_from(self.local_logits(tokens), plan.spread.tp).transpose(0, 1)  # [s, b, v/t] -> [b, s, v]
        if loss_mask is None:
            loss_mask = torch.ones_like(labels, dtype=torch.float32)
        if plan.kernels.head is not None:
            return fused_next_token_loss(self._head_input(tokens), labels, loss_mask, plan=plan)
        return next_token_loss(self.local_logits(tokens), labels, loss_mask, tp=plan.spread.tp, z_loss=plan.z_loss)

    def local_logits(self, tokens: Tensor) -> Tensor:
        """Logits of this rank's part of the vocabulary. Shapes: tokens [b, s] -> [s, b, v/t]."""
        head = self._head_input(tokens)
        return vocabulary_logits(*head, kernel=self.plan.kernels.head_linear, spread=self.plan.spread)

    def _head_input(self, tokens: Tensor) -> HeadInput:
        tokens = tokens.t().contiguous()  # [b, s] -> [s, b]
        x = self.embedding(tokens, self.plan.positions(tokens))  # -> [s, b, h]
        mask = self._mask(tokens)
        for block in self.h:
            x = block(x, mask)
        weight = self.embedding.word_embeddings.weight if self.lm_head is None else self.lm_head.weight
        return HeadInput(self.ln_f(x), weight)

    def _mask(self, tokens: Tensor) -> Tensor | None:
        if self.plan.documents is None or not self.plan.documents.reset_attention:
            return None
        return document_starts(tokens, self.plan.documents.eod_id).t()  # -> [b, s]

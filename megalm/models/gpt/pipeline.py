"""GPT as a list of layers that DeepSpeed deals to pipeline stages.

The position in the list is the number in the name of the layer's checkpoint file, the class name is what
`type:transformer|embedding` cuts stages by, and the attribute names are the files' keys: all three are BigScience's.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import re
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.runtime.utils import partition_balanced, partition_uniform
from torch import Tensor

from megalm.errors import ConfigError
from megalm.models.blocks.block import Addends, ParallelTransformerLayer, leave_additions
from megalm.models.blocks.embedding import GPTEmbedding
from megalm.models.blocks.head import HeadInput, OutputEmbedding, TiedEmbeddingHead, vocabulary_logits
from megalm.models.blocks.norm import LayerNorm
from megalm.models.blocks.positions import document_starts
from megalm.models.gpt.loss import fused_next_token_loss, next_token_loss
from megalm.models.gpt.plan import GPTPlan
from megalm.models.gpt.shape import GPTShape
from megalm.models.gpt.weights import EMBEDDING_LAYER, TIED_KEY, head_layer, weight_table
from megalm.topology.layout import Layout

# With documents that do not see each other, the start of each token's [s, b] travels with the activations.
Started = tuple[Tensor, Tensor]


class EmbeddingPipe(GPTEmbedding):
    """The first layer: tokens [s, b] -> [s, b, h]."""

    def __init__(self, plan: GPTPlan) -> None:
        super().__init__(**plan.embedding_arguments())
        self.plan = plan

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(tokens, self.plan.positions(tokens))


class StartingEmbeddingPipe(EmbeddingPipe):
    """`EmbeddingPipe` that also hands on where each token's document starts."""

    def __init__(self, plan: GPTPlan, *, eod_id: int) -> None:
        super().__init__(plan)
        self.eod_id = eod_id

    def forward(self, tokens: Tensor) -> Started:  # type: ignore[override]
        return super().forward(tokens), document_starts(tokens, self.eod_id)


class ParallelTransformerLayerPipe(ParallelTransformerLayer):
    """A block between two pipeline layers: [s, b, h] -> [s, b, h]; in a stage it may leave its addition to the next."""

    def forward(self, x: Tensor | Addends) -> Tensor | Addends:  # type: ignore[override]
        return super().forward(x)


class StartedParallelTransformerLayerPipe(ParallelTransformerLayer):
    """A block whose tokens attend within their document: ([s, b, h], [s, b]) -> the same."""

    def forward(self, started: Started) -> Started:  # type: ignore[override]
        x, starts = started
        stream = super().forward(x, starts.t())
        assert isinstance(stream, Tensor), "blocks that hand on a pair leave no addition"
        return stream, starts


def sequence_first(tokens: Tensor) -> Tensor:
    """What every later layer computes on. Shapes: [b, s] -> [s, b]."""
    return tokens.t().contiguous()


def unchanged(x: Any) -> Any:
    """Keeps a position of the list that other trainers use for a transposition or a cast."""
    return x


def without_starts(started: Started) -> Tensor:
    """The activations alone, after the last block."""
    return started[0]


def layer_list(plan: GPTPlan) -> list[Callable[..., Any] | LayerSpec]:
    """The layers in order, as specifications that a stage builds if it owns them."""
    spread = plan.spread
    documents = plan.documents if plan.reset_attention else None
    block = ParallelTransformerLayerPipe if documents is None else StartedParallelTransformerLayerPipe
    embedding = EmbeddingPipe if documents is None else StartingEmbeddingPipe
    arguments = {"plan": plan} if documents is None else {"plan": plan, "eod_id": documents.eod_id}

    def tied_head(module: EmbeddingPipe | TiedEmbeddingHead, x: Tensor) -> Tensor | HeadInput:
        if plan.kernels.head is not None:
            return HeadInput.leaving_stage(x, module.word_embeddings.weight)
        return vocabulary_logits(x, module.word_embeddings.weight, kernel=plan.kernels.head_linear, spread=spread)

    tied = functools.partial(TiedLayerSpec, TIED_KEY, tied_weight_attr="word_embeddings.weight")
    is_tied = plan.shape.tie_embeddings
    return [
        sequence_first,
        tied(embedding, **arguments) if is_tied else LayerSpec(embedding, **arguments),
        unchanged,
        *(LayerSpec(block, **plan.block_arguments()) for _ in range(plan.shape.num_layers)),
        unchanged if documents is None else without_starts,
        LayerSpec(LayerNorm, **plan.final_norm_arguments()),
        # A function of the tied module, so that DeepSpeed writes no second file with the same weight.
        tied(TiedEmbeddingHead, forward_fn=tied_head, **plan.head_arguments())
        if is_tied
        else LayerSpec(OutputEmbedding, **plan.head_arguments()),
        unchanged,
    ]


class GPTPipeline(PipelineModule):
    """DeepSpeed's PipelineModule with layers dealt by `deal_stages`, which builds none to learn their sizes.

    Raises: ConfigError if `partition` does not fit the model and the number of stages.
    """

    def __init__(self, plan: GPTPlan, *, layout: Layout, partition: str) -> None:
        def loss(logits: Tensor, labels_and_mask: tuple[Tensor, Tensor]) -> Tensor:
            return next_token_loss(logits, *labels_and_mask, tp=plan.spread.tp, z_loss=plan.z_loss)

        def fused_loss(head: HeadInput, labels_and_mask: tuple[Tensor, Tensor]) -> Tensor:
            return fused_next_token_loss(head, *labels_and_mask, plan=plan)

        self._stages = deal_stages(plan, partition=partition, num_stages=layout.pp)
        # DeepSpeed prints which ranks hold tied weights.
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(
                layers=layer_list(plan),
                topology=PipeModelDataParallelTopology(num_pp=layout.pp, num_mp=layout.tp, num_dp=layout.dp),
                loss_fn=loss if plan.kernels.head is None else fused_loss,
                partition_method=partition,
                activation_checkpoint_interval=0,  # Blocks recompute by themselves, with megalm's random streams.
            )
        self.plan = plan
        if not plan.reset_attention:  # Where documents end, layers hand on a pair as it is.
            leave_additions(self.forward_funcs)

    def _partition_layers(self, method: str = "uniform") -> None:
        # DeepSpeed's own would build every layer of the model on every rank to count parameters.
        self.parts = [0, *(stage.stop for stage in self._stages)]
        mine = self._stages[self._topo.get_coord(self.global_rank).pipe]
        self._set_bounds(start=mine.start, stop=mine.stop)

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        # DeepSpeed 0.19 broadcasts with gradients on, which leaves a warning on every later backward.
        super()._synchronize_tied_weights()

    def train(self, mode: bool = True) -> GPTPipeline:
        """Set the mode of every module, which is one for all; at once if it is set, as DeepSpeed asks at every step."""
        return self if mode == self.training else super().train(mode)

    def stages(self) -> list[range]:
        """Positions of the layers that each stage owns."""
        return list(self._stages)


def deal_stages(plan: GPTPlan, *, partition: str, num_stages: int) -> list[range]:
    """Positions of the layers that each stage owns, as DeepSpeed deals them.

    `partition` is `uniform` (as many layers to each), `parameters` (as many parameters) or `type:REGEX` (as many of the
    layers whose class matches, without regard to case).
    Raises: ConfigError if a pattern matches fewer layers than there are stages, or the first stage would lack the
        embedding, which takes tokens, or the last one the head, whose result the loss takes.
    """
    names = [_class_name(layer) for layer in layer_list(plan)]
    method = partition.lower()
    if method == "uniform":
        parts = partition_uniform(num_items=len(names), num_parts=num_stages)
    elif method == "parameters":
        parts = partition_balanced(weights=layer_parameters(plan.shape), num_parts=num_stages)
    else:
        pattern = re.compile(method.removeprefix("type:"))
        weights = [int(pattern.search(name.lower()) is not None) for name in names]
        if sum(weights) < num_stages:
            raise ConfigError(
                f"parallel.pipeline_partition = {partition} matches {sum(weights)} layers and must match one for each "
                f"stage, of which there are {num_stages}\n  the layers: {', '.join(dict.fromkeys(names))}\n"
                "  type:transformer|embedding, type:transformer, uniform, parameters"
            )
        parts = partition_balanced(weights=weights, num_parts=num_stages)
    stages = [range(start, stop) for start, stop in itertools.pairwise(parts)]
    lacks = None
    if EMBEDDING_LAYER not in stages[0]:
        lacks = "first stage without the embedding"
    elif head_layer(plan.shape) not in stages[-1]:
        lacks = "last stage without the head"
    if lacks is not None:
        raise ConfigError(
            f"parallel.pipeline_partition = {partition} leaves the {lacks}: {num_stages} stages of "
            f"{', '.join(str(len(stage)) for stage in stages)} layers\n"
            "  type:transformer, the default, deals the blocks evenly; or fewer stages"
        )
    return stages


def _class_name(layer: Callable[..., Any] | LayerSpec) -> str:
    return str(layer.typename.__name__ if isinstance(layer, LayerSpec) else layer.__name__)


def layer_parameters(shape: GPTShape) -> list[int]:
    """Parameters of each layer, by which `partition=parameters` balances stages; a tied head counts as its weight."""
    counts = [0] * (shape.num_layers + 7)
    for weight in weight_table(shape):
        counts[weight.layer] += weight.numel
    if shape.tie_embeddings:
        counts[head_layer(shape)] = shape.vocab_rows * shape.hidden_size
    assert counts[EMBEDDING_LAYER] > 0, counts
    return counts

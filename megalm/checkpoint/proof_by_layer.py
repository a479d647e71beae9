"""An export held against the trainer's own model where neither fits in memory whole: one layer of each at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.checkpoint.foreign import ForeignWeights
from megalm.checkpoint.huggingface import BLOOM, family_of, renamed
from megalm.checkpoint.identity import stored_model
from megalm.checkpoint.proof import LOGIT_TOLERANCE, Widened
from megalm.checkpoint.source import open_checkpoint
from megalm.errors import CheckpointError
from megalm.models.blocks.block import ParallelTransformerLayer
from megalm.models.blocks.embedding import GPTEmbedding
from megalm.models.blocks.norm import LayerNorm
from megalm.models.gpt.build import plan_gpt
from megalm.models.gpt.weights import (
    EMBEDDING_LAYER,
    FIRST_BLOCK_LAYER,
    Weight,
    final_norm_layer,
    head_layer,
    weight_table,
)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class LayerProof:
    """What the comparison of every layer found."""

    num_tokens: int
    num_layers: int
    largest_difference: float
    """Of an activation or a logit, absolute."""
    worst_layer: str

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers and the logits of {self.num_tokens} tokens equal transformers' to "
            f"{self.largest_difference:.1e}, the worst in {self.worst_layer}"
        )


class _Comparison:
    """Both sides of an export, layer by layer, in fp64. The trainer's activations are fed to both."""

    def __init__(self, folder: Path, checkpoint: Path, *, dtype: torch.dtype) -> None:
        from transformers import AutoConfig

        source = open_checkpoint(checkpoint)
        self.plan = plan_gpt(stored_model(source.manifest, path=checkpoint))
        self.shape = self.plan.shape
        self._layers = source.layers
        self._theirs = ForeignWeights(folder)
        self._dtype = dtype
        self._family = family_of(self.shape)
        self._config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.worst = (0.0, "no layer")

    def own_weights(self, layer: int) -> dict[str, Tensor]:
        """One layer of the checkpoint, by the key in its file, rounded as the export is."""
        shards = self._layers.read_layer(layer)
        table = [weight for weight in weight_table(self.shape) if weight.layer == layer]
        return {weight.key: self._layers.merge(weight, shards).to(self._dtype).double() for weight in table}

    def their_weights(self, layer: int) -> dict[str, Tensor]:
        """The same layer of the export, by Hugging Face's name without `transformer.`."""
        table = [weight for weight in weight_table(self.shape) if weight.layer == layer]
        names = [self._name(weight) for weight in table]
        return {name: self._theirs.read(name).double() for name in names}

    def _name(self, weight: Weight) -> str:
        return renamed(weight, self.shape, family=self._family).name.removeprefix("transformer.")

    def their_model(self, *, num_layers: int, vocab_rows: int) -> Any:
        """transformers' model with few layers and no final LayerNorm."""
        from transformers import AutoModel

        config = copy.deepcopy(self._config)
        config.n_layer = num_layers
        config.vocab_size = vocab_rows
        config.bos_token_id = config.eos_token_id = config.pad_token_id = None
        model = AutoModel.from_config(config, trust_remote_code=False).double().eval()
        model.ln_f = nn.Identity()
        return model

    def compare(self, where: str, ours: Tensor, theirs: Tensor) -> None:
        """Note the difference, or refuse it."""
        difference = (ours - theirs).abs().max().item()
        if not difference <= LOGIT_TOLERANCE:
            raise CheckpointError(
                f"the export's {where} differs from the trainer's by {difference:.3e} in fp64, more than "
                f"{LOGIT_TOLERANCE:.0e}\n  nothing was published; this is a defect of the export"
            )
        self.worst = max(self.worst, (difference, where))

    def embedding(self, tokens: Tensor) -> Tensor:
        """Compare what enters the first block. Shapes: [b, s] -> [s, b, h]."""
        own = GPTEmbedding(**self.plan.embedding_arguments()).double().eval()
        own.load_state_dict(self.own_weights(EMBEDDING_LAYER))
        x: Tensor = own(tokens.t(), self.plan.positions(tokens.t()))
        del own
        theirs = self.their_model(num_layers=0, vocab_rows=self.shape.vocab_rows)
        theirs.load_state_dict(self.their_weights(EMBEDDING_LAYER))
        self.compare("embedding", x, theirs(tokens).last_hidden_state.transpose(0, 1))
        return x

    def blocks(self, x: Tensor, progress: Progress | None) -> Tensor:
        """Compare every block on the trainer's activations. Shapes: [s, b, h] -> the same."""
        own = ParallelTransformerLayer(**self.plan.block_arguments()).double().eval()
        theirs = self.their_model(num_layers=1, vocab_rows=1)
        if self._family == BLOOM:
            theirs.word_embeddings_layernorm = nn.Identity()
        else:
            theirs.wpe.weight.zero_()
        for block in range(self.shape.num_layers):
            layer = FIRST_BLOCK_LAYER + block
            own.load_state_dict(self.own_weights(layer))
            state = {name.replace(f"h.{block}.", "", 1): tensor for name, tensor in self.their_weights(layer).items()}
            theirs.h[0].load_state_dict(state)
            y: Tensor = own(x)
            self.compare(f"block {block}", y, theirs(inputs_embeds=x.transpose(0, 1)).last_hidden_state.transpose(0, 1))
            x = y
            if progress is not None:
                progress(f"block {block + 1} of {self.shape.num_layers}")
        return x

    def logits(self, x: Tensor) -> None:
        """Compare the logits, one position at a time. Shapes: [s, b, h]."""
        final = final_norm_layer(self.shape)
        norm = LayerNorm(**self.plan.final_norm_arguments()).double().eval()
        norm.load_state_dict(self.own_weights(final))
        head = EMBEDDING_LAYER if self.shape.tie_embeddings else head_layer(self.shape)
        own_key = "word_embeddings.weight" if self.shape.tie_embeddings else "weight"
        own, theirs = self.own_weights(head)[own_key], self.their_weights(head)
        their_norm = self.their_weights(final)
        (their_head,) = (tensor for tensor in theirs.values() if tensor.shape == own.shape)
        epsilon = self.shape.block.layernorm_epsilon
        for position in x:
            normed = F.layer_norm(
                position, position.shape[-1:], their_norm["ln_f.weight"], their_norm["ln_f.bias"], epsilon
            )
            self.compare("logits", norm(position) @ own.t(), normed @ their_head.t())


@torch.no_grad()
def prove_by_layer(
    folder: Path, checkpoint: Path, *, tokens: Tensor, dtype: torch.dtype, progress: Progress | None = None
) -> LayerProof:
    """Compare transformers' layers with weights of `folder` to megalm's with those of `checkpoint`, all in fp64.

    Weaker than `prove_export` in one point: transformers' own chaining of the layers is not run, nor its generation.
    Raises: CheckpointError if an activation or a logit differs by more than LOGIT_TOLERANCE.
    """
    comparison = _Comparison(folder, checkpoint, dtype=dtype)
    with Widened():
        x = comparison.embedding(tokens)
        x = comparison.blocks(x, progress)
        comparison.logits(x)
    difference, where = comparison.worst
    return LayerProof(tokens.numel(), comparison.shape.num_layers, difference, where)


def fits_in_memory(num_parameters: int, *, available_bytes: int | None = None) -> bool:
    """Whether two fp64 copies of a model, one of them beside its fp32 original, leave a quarter of the free memory."""
    if available_bytes is None:
        available_bytes = _available_bytes()
    return (2 * 8 + 4) * num_parameters <= 0.75 * available_bytes


def _available_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 8 * 2**30

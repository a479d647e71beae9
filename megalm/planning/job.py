"""What is to be trained, and one way to spread it."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.model import ModelConfig
from megalm.topology.layout import Layout


@dataclass(frozen=True)
class Job:
    """A model and its steps."""

    model: ModelConfig
    seq_length: int
    global_batch_size: int

    @property
    def num_mlp_matrices(self) -> int:
        """Of [h, f]: a gated MLP has two before its activation."""
        return 2 if self.model.glu_activation is None else 3

    @property
    def block_matrices(self) -> int:
        """Parameters of one block's matrices, which tensor parallelism splits."""
        h, f = self.model.hidden_size, self.model.ffn_size
        return 4 * h * h + self.num_mlp_matrices * h * f

    @property
    def table(self) -> int:
        """Parameters of the embedding, or of the head."""
        return self.model.padded_vocab_size * self.model.hidden_size


@dataclass(frozen=True)
class Spreading:
    """A layout, and what it computes at once and twice."""

    layout: Layout
    micro_batch_size: int
    recompute: str = "none"
    sequence_parallel: bool = False
    counts_ends: bool = False
    """Whether embedding and head count as a block each when layers are dealt to stages."""

    def num_micro_batches(self, job: Job) -> int:
        """Of one replica, in one step."""
        return job.global_batch_size // (self.layout.dp * self.micro_batch_size)

    def tokens(self, job: Job) -> int:
        """Of one micro-batch."""
        return self.micro_batch_size * job.seq_length

    def blocks(self, job: Job) -> int:
        """Of the stage that has most."""
        return -(-(job.model.num_layers + 2 * self.counts_ends) // self.layout.pp)

    def blocks_at_ends(self, job: Job) -> int:
        """Of the first and the last stage, at most."""
        return self.blocks(job) - self.counts_ends if self.layout.pp > 1 else job.model.num_layers

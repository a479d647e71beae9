"""A run small enough for tests, through the program's own code: command line in, losses and whole weights out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VOCAB_SIZE = 96
SEQ_LENGTH = 16
MODEL_FLAGS = [
    "--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", str(SEQ_LENGTH),
    "--position-embedding-type", "alibi", "--embed-layernorm", "--make-vocab-size-divisible-by", "32",
    "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE),
]  # fmt: skip
TRAINING_FLAGS = [
    "--micro-batch-size", "2", "--global-batch-size", "8", "--train-iters", "20", "--lr", "1e-2", "--clip-grad", "0.5",
    "--lr-warmup-iters", "4", "--lr-decay-style", "cosine", "--adam-eps", "1e-5", "--weight-decay", "0.1",
    "--eval-interval", "0", "--num-workers", "0", "--log-level", "error", "--init-method-std", "0.05",
]  # fmt: skip
"""--clip-grad 0.5 clips most of the steps, so that a wrong norm shows. The bias of the keys has gradient 0 (softmax
does not see it), and what rounding leaves of it Adam would blow up to a full update; --adam-eps 1e-5 lets it rest."""


def write_corpus(folder: Path, *, num_documents: int = 200, seed: int = 0) -> str:
    """A corpus of short documents with structure to learn; returns its prefix."""
    from megalm.data.indexed_writer import IndexedWriter

    generator = np.random.default_rng(seed)
    prefix = folder / "corpus_text_document"
    with IndexedWriter(str(prefix), np.dtype(np.uint16)) as writer:
        for _ in range(num_documents):
            length = int(generator.integers(5, 60))
            start = int(generator.integers(0, VOCAB_SIZE))
            writer.add_document((start + 3 * np.arange(length)) % VOCAB_SIZE)
    return str(prefix)


@dataclass(frozen=True)
class RankOutcome:
    """What one rank has at the end: every rank has the losses, each has its part of the weights."""

    losses: list[float]
    rates: list[float]
    grad_norms: list[float | None]
    weights: dict[str, tuple[np.ndarray[Any, Any], int | None]]
    tp_rank: int
    state: dict[str, Any]


class Collector:
    """A sink that keeps every step."""

    def __init__(self) -> None:
        self.steps: list[Any] = []

    def log_step(self, m: Any) -> None:
        self.steps.append(m)

    def log_validation(self, step: int, consumed_samples: int, name: str, loss: float) -> None:
        pass

    def close(self) -> None:
        pass


def train_tiny(flags: list[str]) -> RankOutcome:
    """Run the program on this rank; flags override the tiny model's."""
    from megalm.config.parse import parse_command_line
    from megalm.train.build import running
    from megalm.train.loop import train
    from megalm.train.prepare import prepare

    config = parse_command_line([*MODEL_FLAGS, *TRAINING_FLAGS, *flags])
    with running(prepare(config)) as run:
        collector = Collector()
        run.sinks = [*run.sinks, collector]
        train(run)
        return RankOutcome(
            losses=[m.loss for m in collector.steps],
            rates=[m.lr for m in collector.steps],
            grad_norms=[m.grad_norm for m in collector.steps],
            weights=local_weights(run),
            tp_rank=run.topology.tp.rank,
            state=run.state.to_json(),
        )


def local_weights(run: Any) -> dict[str, tuple[np.ndarray[Any, Any], int | None]]:
    """This rank's parameters under their layout-independent names, with the dimension they are cut along."""
    from deepspeed.pipe import PipelineModule

    from megalm.models.gpt.weights import named_in_model, named_in_pipeline
    from megalm.parallel.shard import partition_dim

    module = run.engine.module
    names = named_in_pipeline if isinstance(module, PipelineModule) else named_in_model
    return {
        name: (parameter.detach().float().cpu().numpy().copy(), partition_dim(parameter))
        for name, parameter in names(module, module.plan.shape)
    }


def consolidate(outcomes: list[RankOutcome]) -> dict[str, np.ndarray[Any, Any]]:
    """Whole weights from all ranks. Copies that should be equal are asserted to be, bit for bit."""
    parts: dict[str, dict[int, np.ndarray[Any, Any]]] = {}
    dims: dict[str, int | None] = {}
    for outcome in outcomes:
        for name, (part, dim) in outcome.weights.items():
            dims[name] = dim
            key = 0 if dim is None else outcome.tp_rank
            known = parts.setdefault(name, {}).setdefault(key, part)
            np.testing.assert_array_equal(part, known, err_msg=f"copies of {name} differ")
    whole = {}
    for name, by_rank in parts.items():
        dim = dims[name]
        ordered = [by_rank[rank] for rank in sorted(by_rank)]
        whole[name] = ordered[0] if dim is None else np.concatenate(ordered, axis=dim)
    return whole

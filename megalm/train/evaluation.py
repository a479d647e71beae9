"""Validation: the same samples every time, so that curves compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from megalm.data.batches import Batch
from megalm.train.engine import Engine


class BatchSource(Protocol):
    """Makes an iterator over one evaluation set, from its first sample on."""

    def __call__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Evaluator:
    """Evaluates each named set on its first `num_micro_batches` micro-batches per replica."""

    sources: Mapping[str, BatchSource]
    num_micro_batches: int

    def run(self, engine: Engine, *, watched: Callable[[Iterator[Batch]], Iterator[Batch]] = iter) -> dict[str, float]:
        """Mean loss of every set, nats per token, by name; batches come through `watched`."""
        return {
            name: engine.evaluate(watched(source()), num_micro_batches=self.num_micro_batches)
            for name, source in self.sources.items()
        }

"""All ways to spread a job over GPUs that fit, by the time of a step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megalm.planning.gpus import Gpu
from megalm.planning.job import Job, Spreading
from megalm.planning.memory import most_bytes
from megalm.planning.step_time import Parts, step_parts
from megalm.topology.layout import Layout

USABLE = 0.92
"""Of a GPU's memory: the rest is the driver's, the libraries' and lost between tensors."""
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
NOTABLE = 0.995
"""Of two micro-batches or recomputations, the one that takes more memory must take less than this share of the time."""
RECOMPUTES = ("none", "activation", "full")


@dataclass(frozen=True)
class Plan:
    """A way to spread a job, and what is predicted of it."""

    spreading: Spreading
    most_bytes: float
    parts: Parts

    def fits(self, gpu: Gpu) -> bool:
        """Whether the memory does."""
        return self.most_bytes <= USABLE * gpu.memory_bytes


def plan_of(job: Job, spreading: Spreading, gpu: Gpu, *, gpus_per_host: int) -> Plan:
    """One way, whether it fits or not."""
    parts = step_parts(job, spreading, gpu, gpus_per_host=gpus_per_host)
    return Plan(spreading, most_bytes(job, spreading), parts)


def plans(job: Job, gpu: Gpu, *, num_gpus: int, gpus_per_host: int) -> list[Plan]:
    """What fits, the fastest first; for each layout the best of its micro-batches and recomputations."""
    best: dict[Layout, Plan] = {}
    ways = _spreadings(job, num_gpus=num_gpus, gpus_per_host=gpus_per_host)
    every = (plan_of(job, way, gpu, gpus_per_host=gpus_per_host) for way in ways)
    for found in sorted((plan for plan in every if plan.fits(gpu)), key=lambda plan: plan.most_bytes):
        known = best.get(found.spreading.layout)
        if known is None or found.parts.total < NOTABLE * known.parts.total:
            best[found.spreading.layout] = found
    return sorted(best.values(), key=lambda found: found.parts.total)


def _spreadings(job: Job, *, num_gpus: int, gpus_per_host: int) -> Iterator[Spreading]:
    """Tensor ranks stay in a host, and every stage has a block."""
    model = job.model
    for tp in range(1, min(gpus_per_host, num_gpus) + 1):
        if gpus_per_host % tp or model.num_heads % tp or model.ffn_size % tp or model.padded_vocab_size % tp:
            continue
        for pp in range(1, min(model.num_layers, num_gpus // tp) + 1):
            if num_gpus % (tp * pp):
                continue
            layout = Layout(tp=tp, pp=pp, dp=num_gpus // (tp * pp))
            for size in MICRO_BATCHES:
                if job.global_batch_size % (layout.dp * size):
                    continue
                splits = (False, True) if tp > 1 and job.seq_length % tp == 0 else (False,)
                counts = (False, True) if pp > 1 else (False,)
                for recompute, split, count in itertools.product(RECOMPUTES, splits, counts):
                    yield Spreading(layout, size, recompute, split, count)

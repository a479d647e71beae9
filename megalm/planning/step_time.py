"""Seconds of a step, from arithmetic, bytes and links. Nothing is taken to overlap.

Held against published runs and the trainer's own: tests/unit/planning/test_step_time.py, docs/launch.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalm.planning.gpus import Gpu
from megalm.planning.job import Job, Spreading


@dataclass(frozen=True)
class Kernels:
    """What a forward pass does beside matrix products, for a token. Backward does twice as much."""

    stream_bytes: float
    """Read and written in a block for each element of the residual stream."""
    split_bytes: float
    """The same of what tensor parallelism splits, for each of f elements of the MLP."""
    score_bytes: float
    """The same for each head and position: 0 where scores stay in the kernel."""
    logit_bytes: float
    """Forward and backward, for each row of the vocabulary."""
    sees_all: bool
    """Whether attention computes pairs that are masked too, by matrix products."""
    replica_bytes: float
    """A parameter, of an all-reduce over replicas."""


MEGALM = Kernels(
    stream_bytes=16.0, split_bytes=10.0 / 3.0, score_bytes=0.0, logit_bytes=4.0, sees_all=False, replica_bytes=3.0
)
"""From a profile on an H100 (docs/performance.md). fp32 sums are scattered and bf16 weights gathered, half of an
all-reduce each."""
OF_2021 = Kernels(
    stream_bytes=20.0, split_bytes=7.0, score_bytes=8.0, logit_bytes=14.0, sees_all=True, replica_bytes=2.0
)
"""Scores in memory, between products, a fused softmax and dropout; gradients of 16 bits: Megatron-LM's of that year."""


@dataclass(frozen=True)
class Parts:
    """Seconds of a step on the stage that decides it, by what they are spent on."""

    products: float
    attention: float
    between: float
    """What stands between the products: LayerNorm, activation, additions, scores in memory."""
    head: float
    tensor_parallel: float
    sends: float
    bubble: float
    replicas: float
    update: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(vars(self).values())


def step_parts(
    job: Job,
    spreading: Spreading,
    gpu: Gpu,
    *,
    gpus_per_host: int,
    kernels: Kernels = MEGALM,
    num_chunks: int = 1,
) -> Parts:
    """The time of one step. `num_chunks` of an interleaved schedule divide the bubble, and multiply what is sent."""
    layout, tokens = spreading.layout, spreading.tokens(job)
    h, tp = job.model.hidden_size, layout.tp
    num = spreading.num_micro_batches(job)
    again = 1.0 if spreading.recompute == "full" else 0.0
    products = (3.0 + again) * _block_products(job, tokens, tp, gpu)
    attention = _attention(job, tokens, tp, gpu, kernels, again)
    between = (3.0 + again) * _between(job, tokens, spreading, gpu, kernels)
    if spreading.recompute == "activation":
        between += tokens * _split_bytes(job, kernels) / tp / gpu.copy_rate
    tensor = (4.0 + 2.0 * again) * _all_reduce(2.0 * tokens * h, tp, gpu.link_rate)
    block = products + attention + between + tensor
    head = 3.0 * _product(gpu, tokens, h, job.model.padded_vocab_size / tp)
    head += kernels.logit_bytes * tokens * job.model.padded_vocab_size / tp / gpu.copy_rate
    across = gpu.link_rate if layout.world_size <= gpus_per_host else gpu.network_rate
    sends = 2.0 * num_chunks * 2.0 * tokens * h / tp / across if layout.pp > 1 else 0.0
    # The slowest stage sets the pace: the last one, with the head, or one with more blocks.
    blocks = spreading.blocks_at_ends(job)
    if blocks * block + head < spreading.blocks(job) * block:
        blocks, head = spreading.blocks(job), 0.0
    parameters = (job.block_matrices * blocks + job.table) / tp
    return Parts(
        products=num * blocks * products,
        attention=num * blocks * attention,
        between=num * blocks * between,
        head=num * head,
        tensor_parallel=num * blocks * tensor,
        sends=num * sends,
        bubble=(layout.pp - 1) / num_chunks * (blocks * block + sends),
        replicas=_all_reduce(kernels.replica_bytes * parameters, layout.dp, across),
        update=parameters * (_SUM_BYTES + _UPDATE_BYTES / layout.dp) / gpu.copy_rate,
    )


_SUM_BYTES, _UPDATE_BYTES = 8.0, 38.0
"""A parameter: sums cleared and measured; masters, moments and weights of a replica's part."""
_OF_2021_ATTENTION = 0.75
"""Of the rate of large products, that those of single heads reach."""


def _product(gpu: Gpu, rows: float, inner: float, columns: float) -> float:
    return 2.0 * rows * inner * columns / gpu.product_rate(rows, inner, columns)


def _block_products(job: Job, tokens: int, tp: int, gpu: Gpu) -> float:
    """The four products of a block, forward."""
    h, f = job.model.hidden_size, job.model.ffn_size
    before = (job.num_mlp_matrices - 1) * f
    sides = ((h, 3 * h / tp), (h / tp, h), (h, before / tp), (f / tp, h))
    return sum(_product(gpu, tokens, inner, columns) for inner, columns in sides)


def _attention(job: Job, tokens: int, tp: int, gpu: Gpu, kernels: Kernels, again: float) -> float:
    """Forward, backward and what is computed again; backward computes the scores once more if nobody kept them."""
    flops = 4.0 * tokens * job.seq_length * job.model.hidden_size / tp
    if kernels.sees_all:
        return (3.0 + again) * flops / (gpu.peak_flops * gpu.product_share * _OF_2021_ATTENTION)
    return (3.5 + again) * flops / 2.0 / (gpu.peak_flops * gpu.attention_share)


def _between(job: Job, tokens: int, spreading: Spreading, gpu: Gpu, kernels: Kernels) -> float:
    tp = spreading.layout.tp
    stream = kernels.stream_bytes * job.model.hidden_size / (tp if spreading.sequence_parallel else 1)
    split = _split_bytes(job, kernels)
    scores = kernels.score_bytes * job.model.num_heads * job.seq_length
    return tokens * (stream + (split + scores) / tp) / gpu.copy_rate


def _split_bytes(job: Job, kernels: Kernels) -> float:
    """Of the activation, forward."""
    return kernels.split_bytes * job.model.ffn_size * (job.num_mlp_matrices - 1)


def _all_reduce(num_bytes: float, size: int, rate: float) -> float:
    """In a ring, each rank sends its bytes twice but for its own part."""
    return 2.0 * (size - 1) / size * num_bytes / rate

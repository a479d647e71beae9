"""Bytes of GPU memory that a run takes, on the rank that takes most. bf16 with fp32 masters, ZeRO-1.

Held against torch's peak in runs on one GPU: tests/unit/planning/test_memory.py.
"""

from __future__ import annotations

from megalm.planning.gpus import GIB
from megalm.planning.job import Job, Spreading

WEIGHT_AND_SUM, UPDATE = 2 + 4, 4 + 4 + 4
"""Bytes a parameter: bf16 and its fp32 sum of gradients; master and moments, which replicas share out."""
STREAM, ENDS = 10, 32
"""Bytes that backward needs, for a token and each element of the residual stream: in a block, of what is as wide as the
stream (inputs and results of two LayerNorms and an addition); and at the ends of the model."""
HEAD_BYTES = GIB
"""For logits of some tokens at a time."""


def most_bytes(job: Job, spreading: Spreading) -> float:
    """The largest over the stages."""
    last = spreading.layout.pp - 1
    return max(stage_bytes(job, spreading, stage) for stage in {0, min(1, last), last})


def stage_bytes(job: Job, spreading: Spreading, stage: int) -> float:
    """What a rank of this stage allocates at most; what the driver and libraries keep for themselves is not in it."""
    layout, h = spreading.layout, job.model.hidden_size
    is_first, is_last = stage == 0, stage == layout.pp - 1
    blocks = spreading.blocks_at_ends(job) if is_first or is_last else spreading.blocks(job)
    parameters = blocks * (job.block_matrices / layout.tp + 13 * h)
    parameters += job.table / layout.tp * _num_tables(job, is_first=is_first, is_last=is_last)
    state = parameters * (WEIGHT_AND_SUM + UPDATE / layout.dp)
    tokens = spreading.tokens(job)
    in_flight = min(layout.pp - stage, spreading.num_micro_batches(job))
    kept = tokens * blocks * _block_bytes(job, spreading) * in_flight
    if spreading.recompute == "full":  # One block at a time is computed again.
        kept += tokens * _block_bytes(job, Spreading(layout, spreading.micro_batch_size))
    if is_first or is_last:
        kept += tokens * ENDS * h
    return state + kept + (HEAD_BYTES if is_last else 0.0)


def _num_tables(job: Job, *, is_first: bool, is_last: bool) -> int:
    """Tables of a stage; one that holds both ends of a tied model has one."""
    tied = job.model.tie_embeddings and is_first and is_last
    return 1 if tied else is_first + is_last


def _block_bytes(job: Job, spreading: Spreading) -> float:
    """What backward needs of one token in one block."""
    model, tp = job.model, spreading.layout.tp
    h, f = model.hidden_size, model.ffn_size
    narrow = tp if spreading.sequence_parallel else 1
    if spreading.recompute == "full":
        return 2 * h / narrow
    split = 6 * h + 2 * h + 2 * f * (job.num_mlp_matrices - 1) + 2 * f  # q, k, v; attention; before, after activation
    if spreading.recompute == "activation":
        split -= 2 * f
    elif spreading.recompute == "selective":
        split -= 2 * h
    return STREAM * h / narrow + split / tp

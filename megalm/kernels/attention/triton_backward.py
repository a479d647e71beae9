"""Backward kernels of the Triton attention core: one for queries, one for keys and values.

Letters and exponents as in `triton_forward`. Each gradient is summed by one program in a fixed order, without atomic
additions: two runs agree to the last bit. The price is that the weights are computed twice, seven products in place of
five; no form of the gradient of the queries between the two kernels goes through memory.

With P the weights, dP = dO v^T and delta = sum over d of dO * O: dS = P * (dP - delta), dq = dS k, dk = dS^T q and
dv = P^T dO.
Source: Dao 2023, arXiv:2307.08691, algorithm 2.
"""

from __future__ import annotations

from megalm.kernels.attention.triton_forward import kept_weights
from megalm.kernels.triton_language import jit, tl


@jit
def _visit_keys(
    dq: tl.tensor,
    q: tl.tensor,
    do: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    k_desc: tl.tensor,
    v_desc: tl.tensor,
    batch: tl.tensor,
    kv_head: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    rows: tl.tensor,
    starts: tl.tensor,
    slope2: tl.tensor,
    scale2: tl.tensor,
    seed: tl.tensor,
    head_index: tl.tensor,
    threshold: tl.tensor,
    keep: tl.tensor,
    BLOCK_K: tl.constexpr,
    D: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ALIBI: tl.constexpr,
    STARTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    columns = tl.arange(0, BLOCK_K)
    for start in tl.range(begin, end, BLOCK_K):
        k = k_desc.load([batch, kv_head, start, 0]).reshape(BLOCK_K, D)
        t = tl.dot(q, k.T, input_precision=PRECISION) * scale2
        v = v_desc.load([batch, kv_head, start, 0]).reshape(BLOCK_K, D)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        keys = start + columns
        row_term = -lse
        if ALIBI:
            if DIAGONAL:
                t += slope2 * (keys[None, :] - rows[:, None]).to(tl.float32)
            else:
                t += (slope2 * (columns - (BLOCK_K - 1)).to(tl.float32))[None, :]
                row_term = slope2 * (start + (BLOCK_K - 1) - rows).to(tl.float32) - lse
        p = tl.exp2(t + row_term[:, None])
        if DIAGONAL:
            p = tl.where(keys[None, :] <= rows[:, None], p, 0.0)
        if STARTS:
            p = tl.where(keys[None, :] >= starts[:, None], p, 0.0)
        if DROPOUT:
            kept = kept_weights(seed, head_index, rows[:, None], keys[None, :], threshold)
            dp = tl.where(kept, dp / keep, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@jit
def query_gradient(
    q_desc: tl.tensor,
    k_desc: tl.tensor,
    v_desc: tl.tensor,
    do_desc: tl.tensor,
    out_desc: tl.tensor,
    dq: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    first_key: tl.tensor,
    slopes: tl.tensor,
    starts: tl.tensor,
    seed: tl.tensor,
    dq_stride_b: tl.tensor,
    dq_stride_n: tl.tensor,
    dq_stride_s: tl.tensor,
    num_heads: tl.tensor,
    num_positions: tl.tensor,
    num_bounds: tl.tensor,
    scale: tl.tensor,
    threshold: tl.tensor,
    keep: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    BOUND_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIBI: tl.constexpr,
    STARTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """dq of BLOCK_Q queries of one head, and `delta`, which `key_value_gradient` reads.

    Shapes: as `attention_forward`, whose blocks are `num_bounds` of BOUND_BLOCK queries; dq as q, delta as lse.
    """
    batch_head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    batch = batch_head // num_heads
    head = batch_head % num_heads
    first_row = block * BLOCK_Q
    rows = first_row + tl.arange(0, BLOCK_Q)
    inside = rows < num_positions
    row_offset = batch_head.to(tl.int64) * (num_bounds * BOUND_BLOCK)
    slope2 = 0.0
    if ALIBI:
        slope2 = tl.load(slopes + head) * 1.4426950408889634
    begins = rows * 0
    if STARTS:
        begins = tl.load(starts + batch.to(tl.int64) * num_positions + rows, mask=inside, other=2147483647)
    drop_seed = 0
    if DROPOUT:
        drop_seed = tl.load(seed)

    q = q_desc.load([batch, head, first_row, 0]).reshape(BLOCK_Q, D)
    do = do_desc.load([batch, head, first_row, 0]).reshape(BLOCK_Q, D)
    out = out_desc.load([batch, head, first_row, 0]).reshape(BLOCK_Q, D)
    row_delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta + row_offset + rows, row_delta)
    row_lse = tl.load(lse + row_offset + rows)
    acc = tl.zeros([BLOCK_Q, D], dtype=tl.float32)
    scale2 = scale * 1.4426950408889634
    end = tl.minimum(first_row + BLOCK_Q, num_positions)
    acc = _visit_keys(
        acc, q, do, row_lse, row_delta, k_desc, v_desc, batch, head // GROUP, first_row, end, rows, begins, slope2,
        scale2, drop_seed, batch_head, threshold, keep, BLOCK_K, D, True, ALIBI, STARTS, DROPOUT, PRECISION,
    )  # fmt: skip
    low = tl.load(first_key + batch_head * num_bounds + first_row // BOUND_BLOCK) // BLOCK_K * BLOCK_K
    acc = _visit_keys(
        acc, q, do, row_lse, row_delta, k_desc, v_desc, batch, head // GROUP, low, first_row, rows, begins, slope2,
        scale2, drop_seed, batch_head, threshold, keep, BLOCK_K, D, False, ALIBI, STARTS, DROPOUT, PRECISION,
    )  # fmt: skip
    columns = tl.arange(0, D)
    base = dq + batch.to(tl.int64) * dq_stride_b + head.to(tl.int64) * dq_stride_n
    offsets = rows.to(tl.int64)[:, None] * dq_stride_s + columns[None, :]
    values = (acc * scale).to(dq.dtype.element_ty)
    tl.store(base + offsets, values, mask=inside[:, None] & (columns < HEAD_SIZE)[None, :])


@jit
def _visit_queries(
    dk: tl.tensor,
    dv: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    q_desc: tl.tensor,
    do_desc: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    starts: tl.tensor,
    batch: tl.tensor,
    head: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    keys: tl.tensor,
    slope2: tl.tensor,
    scale2: tl.tensor,
    seed: tl.tensor,
    head_index: tl.tensor,
    threshold: tl.tensor,
    keep: tl.tensor,
    num_positions: tl.tensor,
    BLOCK_Q: tl.constexpr,
    D: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ALIBI: tl.constexpr,
    STARTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Weights are held transposed, [keys, queries], so that both sums take them from registers."""
    columns = tl.arange(0, BLOCK_Q)
    for start in tl.range(begin, end, BLOCK_Q):
        rows = start + columns
        q = q_desc.load([batch, head, start, 0]).reshape(BLOCK_Q, D)
        row_lse = tl.load(lse + rows)
        t = tl.dot(k, q.T, input_precision=PRECISION) * scale2
        if ALIBI:
            if DIAGONAL:
                t += slope2 * (keys[:, None] - rows[None, :]).to(tl.float32)
            else:
                t += (slope2 * (keys - start).to(tl.float32))[:, None]
                row_lse += slope2 * columns.to(tl.float32)
        p = tl.exp2(t - row_lse[None, :])
        if DIAGONAL:
            p = tl.where(keys[:, None] <= rows[None, :], p, 0.0)
        if STARTS:
            begins = tl.load(starts + rows, mask=rows < num_positions, other=0)
            p = tl.where(keys[:, None] >= begins[None, :], p, 0.0)
        do = do_desc.load([batch, head, start, 0]).reshape(BLOCK_Q, D)
        dropped = p
        if DROPOUT:
            kept = kept_weights(seed, head_index, rows[None, :], keys[:, None], threshold)
            dropped = tl.where(kept, p / keep, 0.0)
        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, do.T, input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(kept, dp / keep, 0.0)
        row_delta = tl.load(delta + rows)
        ds = p * (dp - row_delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@jit
def _end_of_queries(
    bounds: tl.tensor, num_bounds: tl.tensor, keys_end: tl.tensor, begin: tl.tensor, BOUND_BLOCK: tl.constexpr
) -> tl.tensor:
    """The end of the last block of queries that visited a key before `keys_end`, or `begin`."""
    last = begin
    for start in range(0, num_bounds, 128):
        index = start + tl.arange(0, 128)
        bound = tl.load(bounds + index, mask=index < num_bounds, other=2147483647)
        last = tl.maximum(last, tl.max(tl.where(bound < keys_end, (index + 1) * BOUND_BLOCK, 0), axis=0))
    return last


@jit
def key_value_gradient(
    q_desc: tl.tensor,
    k_desc: tl.tensor,
    v_desc: tl.tensor,
    do_desc: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    first_key: tl.tensor,
    slopes: tl.tensor,
    starts: tl.tensor,
    seed: tl.tensor,
    dk_stride_b: tl.tensor,
    dk_stride_n: tl.tensor,
    dk_stride_s: tl.tensor,
    dv_stride_b: tl.tensor,
    dv_stride_n: tl.tensor,
    dv_stride_s: tl.tensor,
    kv_heads: tl.tensor,
    num_positions: tl.tensor,
    num_bounds: tl.tensor,
    scale: tl.tensor,
    threshold: tl.tensor,
    keep: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    BOUND_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIBI: tl.constexpr,
    STARTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """dk and dv of BLOCK_K keys of one head of keys, summed over the GROUP heads of queries that share it.

    Shapes: as `query_gradient`; dk, dv as k, v.
    """
    batch_head = tl.program_id(0)
    batch = batch_head // kv_heads
    kv_head = batch_head % kv_heads
    num_heads = kv_heads * GROUP
    first_of_block = tl.program_id(1) * BLOCK_K
    keys = first_of_block + tl.arange(0, BLOCK_K)
    scale2 = scale * 1.4426950408889634
    drop_seed = 0
    if DROPOUT:
        drop_seed = tl.load(seed)
    begins = starts
    if STARTS:
        begins = starts + batch.to(tl.int64) * num_positions

    k = k_desc.load([batch, kv_head, first_of_block, 0]).reshape(BLOCK_K, D)
    v = v_desc.load([batch, kv_head, first_of_block, 0]).reshape(BLOCK_K, D)
    dk_acc = tl.zeros([BLOCK_K, D], dtype=tl.float32)
    dv_acc = tl.zeros([BLOCK_K, D], dtype=tl.float32)
    diagonal_end = tl.minimum(first_of_block + BLOCK_K, num_positions)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        head_index = batch * num_heads + head
        row_offset = head_index.to(tl.int64) * (num_bounds * BOUND_BLOCK)
        slope2 = 0.0
        if ALIBI:
            slope2 = tl.load(slopes + head) * 1.4426950408889634
        end = _end_of_queries(
            first_key + head_index * num_bounds, num_bounds, first_of_block + BLOCK_K, diagonal_end, BOUND_BLOCK
        )
        dk_acc, dv_acc = _visit_queries(
            dk_acc, dv_acc, k, v, q_desc, do_desc, lse + row_offset, delta + row_offset, begins, batch, head,
            first_of_block, diagonal_end, keys, slope2, scale2, drop_seed, head_index, threshold, keep, num_positions,
            BLOCK_Q, D, True, ALIBI, STARTS, DROPOUT, PRECISION,
        )  # fmt: skip
        dk_acc, dv_acc = _visit_queries(
            dk_acc, dv_acc, k, v, q_desc, do_desc, lse + row_offset, delta + row_offset, begins, batch, head,
            first_of_block + BLOCK_K, tl.minimum(end, num_positions), keys, slope2, scale2, drop_seed, head_index,
            threshold, keep, num_positions, BLOCK_Q, D, False, ALIBI, STARTS, DROPOUT, PRECISION,
        )  # fmt: skip

    columns = tl.arange(0, D)
    inside = (keys < num_positions)[:, None] & (columns < HEAD_SIZE)[None, :]
    wide_keys = keys.to(tl.int64)[:, None]
    dk_base = dk + batch.to(tl.int64) * dk_stride_b + kv_head.to(tl.int64) * dk_stride_n
    tl.store(dk_base + wide_keys * dk_stride_s + columns[None, :], (dk_acc * scale).to(dk.dtype.element_ty), inside)
    dv_base = dv + batch.to(tl.int64) * dv_stride_b + kv_head.to(tl.int64) * dv_stride_n
    tl.store(dv_base + wide_keys * dv_stride_s + columns[None, :], dv_acc.to(dv.dtype.element_ty), inside)

"""Backward kernels of the Triton attention core: one for queries, one for keys and values.

Letters and exponents as in `triton_forward`. Each gradient is summed by one program in a fixed order, without atomic
additions: two runs agree to the last bit. The price is that the weights are computed twice, seven products in place of
five; no form of the gradient of the queries between the two kernels goes through memory.

With P the weights, dP = dO v^T and delta = sum over d of dO * O: dS = P * (dP - delta), dq = dS k, dk = dS^T q and
dv = P^T dO.
Source: Dao 2023, arXiv:2307.08691, algorithm 2.
"""

from __future__ import annotations

from megalm.kernels.attention.triton_forward import kept_weights, place_in_grid, row_products, store_rows
from megalm.kernels.triton_language import jit, tl


@jit
def _store_sums(
    base: tl.tensor, values: tl.tensor, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_SIZE: tl.constexpr
) -> None:
    """Store the sums over positions of the columns from FIRST on of a head; positions past the end have zeros."""
    columns = FIRST + tl.arange(0, WIDTH)
    tl.store(base + columns, tl.sum(values, axis=0), mask=columns < HEAD_SIZE)


@jit
def _visit_keys(
    dq: tl.tensor,
    dq_rest: tl.tensor,
    q: tl.tensor,
    q_rest: tl.tensor,
    do: tl.tensor,
    do_rest: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    k_desc: tl.tensor,
    k_rest_desc: tl.tensor,
    v_desc: tl.tensor,
    v_rest_desc: tl.tensor,
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
    R: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ALIBI: tl.constexpr,
    STARTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    columns = tl.arange(0, BLOCK_K)
    for start in tl.range(begin, end, BLOCK_K):
        k = k_desc.load([batch, kv_head, start, 0]).reshape(BLOCK_K, D)
        t = tl.dot(q, k.T, input_precision=PRECISION)
        v = v_desc.load([batch, kv_head, start, 0]).reshape(BLOCK_K, D)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        if R:
            k_rest = k_rest_desc.load([batch, kv_head, start, D]).reshape(BLOCK_K, R)
            t = tl.dot(q_rest, k_rest.T, t, input_precision=PRECISION)
            v_rest = v_rest_desc.load([batch, kv_head, start, D]).reshape(BLOCK_K, R)
            dp = tl.dot(do_rest, v_rest.T, dp, input_precision=PRECISION)
        t = t * scale2
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
        if R:
            dq_rest = tl.dot(ds.to(k.dtype), k_rest, dq_rest, input_precision=PRECISION)
    return dq, dq_rest


@jit
def attention_query_gradient(
    q_desc: tl.tensor,
    q_rest_desc: tl.tensor,
    k_desc: tl.tensor,
    k_rest_desc: tl.tensor,
    v_desc: tl.tensor,
    v_rest_desc: tl.tensor,
    do_desc: tl.tensor,
    do_rest_desc: tl.tensor,
    out_desc: tl.tensor,
    out_rest_desc: tl.tensor,
    dq: tl.tensor,
    lse: tl.tensor,
    shifted_lse: tl.tensor,
    delta: tl.tensor,
    sums: tl.tensor,
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
    num_sums: tl.tensor,
    heads_at_once: tl.tensor,
    scale: tl.tensor,
    threshold: tl.tensor,
    keep: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BOUND_BLOCK: tl.constexpr,
    SHIFT_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIBI: tl.constexpr,
    STARTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    """dq of BLOCK_Q queries of one head, and what the other kernel reads of them: `delta` and `shifted_lse`.

    The second is lse + slope * (position in a block of SHIFT_BLOCK), ALiBi's part that varies over the queries of a
    block. `attention_key_value_gradient` would keep it in 16 registers that it does not have.

    Shapes: as `attention_forward`, whose blocks are `num_bounds` of BOUND_BLOCK queries; dq as q, the others as lse;
        with SUMS, sums [b, num_sums, n, 3, d] fp32 gets the sum over each block of queries at 0 of the 3.
    """
    num_blocks = tl.cdiv(num_positions, BLOCK_Q)
    batch_head, turn = place_in_grid(num_blocks, heads_at_once)
    block = num_blocks - 1 - turn
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
    row_delta = row_products(do, out)
    acc = tl.zeros([BLOCK_Q, D], dtype=tl.float32)
    q_rest, do_rest, acc_rest = 0.0, 0.0, 0.0
    if R:
        q_rest = q_rest_desc.load([batch, head, first_row, D]).reshape(BLOCK_Q, R)
        do_rest = do_rest_desc.load([batch, head, first_row, D]).reshape(BLOCK_Q, R)
        out_rest = out_rest_desc.load([batch, head, first_row, D]).reshape(BLOCK_Q, R)
        row_delta += row_products(do_rest, out_rest)
        acc_rest = tl.zeros([BLOCK_Q, R], dtype=tl.float32)
    tl.store(delta + row_offset + rows, row_delta)
    row_lse = tl.load(lse + row_offset + rows)
    if ALIBI:
        tl.store(shifted_lse + row_offset + rows, row_lse + slope2 * (rows % SHIFT_BLOCK).to(tl.float32))
    scale2 = scale * 1.4426950408889634
    end = tl.minimum(first_row + BLOCK_Q, num_positions)
    acc, acc_rest = _visit_keys(
        acc, acc_rest, q, q_rest, do, do_rest, row_lse, row_delta, k_desc, k_rest_desc, v_desc, v_rest_desc, batch,
        head // GROUP, first_row, end, rows, begins, slope2, scale2, drop_seed, batch_head, threshold, keep,
        BLOCK_K, D, R, True, ALIBI, STARTS, DROPOUT, PRECISION,
    )  # fmt: skip
    low = tl.load(first_key + batch_head * num_bounds + first_row // BOUND_BLOCK) // BLOCK_K * BLOCK_K
    acc, acc_rest = _visit_keys(
        acc, acc_rest, q, q_rest, do, do_rest, row_lse, row_delta, k_desc, k_rest_desc, v_desc, v_rest_desc, batch,
        head // GROUP, low, first_row, rows, begins, slope2, scale2, drop_seed, batch_head, threshold, keep,
        BLOCK_K, D, R, False, ALIBI, STARTS, DROPOUT, PRECISION,
    )  # fmt: skip
    base = dq + batch.to(tl.int64) * dq_stride_b + head.to(tl.int64) * dq_stride_n
    store_rows(base, rows, dq_stride_s, acc * scale, num_positions, 0, D, HEAD_SIZE)
    if R:
        store_rows(base, rows, dq_stride_s, acc_rest * scale, num_positions, D, R, HEAD_SIZE)
    if SUMS:
        own = sums + ((batch * num_sums + block) * num_heads + head).to(tl.int64) * (3 * HEAD_SIZE)
        _store_sums(own, acc * scale, 0, D, HEAD_SIZE)
        if R:
            _store_sums(own, acc_rest * scale, D, R, HEAD_SIZE)


@jit
def _visit_queries(
    dk: tl.tensor,
    dk_rest: tl.tensor,
    dv: tl.tensor,
    dv_rest: tl.tensor,
    k: tl.tensor,
    k_rest: tl.tensor,
    v: tl.tensor,
    v_rest: tl.tensor,
    q_desc: tl.tensor,
    q_rest_desc: tl.tensor,
    do_desc: tl.tensor,
    do_rest_desc: tl.tensor,
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
    R: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ALIBI: tl.constexpr,
    STARTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Weights are held transposed, [keys, queries], so that both sums take them from registers.

    `lse` is `shifted_lse` where the causal mask is not needed.
    """
    columns = tl.arange(0, BLOCK_Q)
    for start in tl.range(begin, end, BLOCK_Q):
        rows = start + columns
        q = q_desc.load([batch, head, start, 0]).reshape(BLOCK_Q, D)
        row_lse = tl.load(lse + rows)
        t = tl.dot(k, q.T, input_precision=PRECISION)
        if R:
            q_rest = q_rest_desc.load([batch, head, start, D]).reshape(BLOCK_Q, R)
            t = tl.dot(k_rest, q_rest.T, t, input_precision=PRECISION)
        t = t * scale2
        if ALIBI:
            if DIAGONAL:
                t += slope2 * (keys[:, None] - rows[None, :]).to(tl.float32)
            else:
                t += (slope2 * (keys - start).to(tl.float32))[:, None]
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
        if R:
            do_rest = do_rest_desc.load([batch, head, start, D]).reshape(BLOCK_Q, R)
            dv_rest = tl.dot(dropped.to(do.dtype), do_rest, dv_rest, input_precision=PRECISION)
            dp = tl.dot(v_rest, do_rest.T, dp, input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(kept, dp / keep, 0.0)
        row_delta = tl.load(delta + rows)
        ds = p * (dp - row_delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        if R:
            dk_rest = tl.dot(ds.to(q.dtype), q_rest, dk_rest, input_precision=PRECISION)
    return dk, dk_rest, dv, dv_rest


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
def attention_key_value_gradient(
    q_desc: tl.tensor,
    q_rest_desc: tl.tensor,
    k_desc: tl.tensor,
    k_rest_desc: tl.tensor,
    v_desc: tl.tensor,
    v_rest_desc: tl.tensor,
    do_desc: tl.tensor,
    do_rest_desc: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    lse: tl.tensor,
    shifted_lse: tl.tensor,
    delta: tl.tensor,
    sums: tl.tensor,
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
    num_sums: tl.tensor,
    heads_at_once: tl.tensor,
    scale: tl.tensor,
    threshold: tl.tensor,
    keep: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BOUND_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIBI: tl.constexpr,
    STARTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    """dk and dv of BLOCK_K keys of one head of keys, summed over the GROUP heads of queries that share it.

    Shapes: as `attention_query_gradient`; dk, dv as k, v. With SUMS, which takes GROUP = 1, theirs are at 1 and 2.
    """
    batch_head, block = place_in_grid(tl.cdiv(num_positions, BLOCK_K), heads_at_once)
    batch = batch_head // kv_heads
    kv_head = batch_head % kv_heads
    num_heads = kv_heads * GROUP
    first_of_block = block * BLOCK_K
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
    k_rest, v_rest, dk_rest, dv_rest = 0.0, 0.0, 0.0, 0.0
    if R:
        k_rest = k_rest_desc.load([batch, kv_head, first_of_block, D]).reshape(BLOCK_K, R)
        v_rest = v_rest_desc.load([batch, kv_head, first_of_block, D]).reshape(BLOCK_K, R)
        dk_rest = tl.zeros([BLOCK_K, R], dtype=tl.float32)
        dv_rest = tl.zeros([BLOCK_K, R], dtype=tl.float32)
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
        dk_acc, dk_rest, dv_acc, dv_rest = _visit_queries(
            dk_acc, dk_rest, dv_acc, dv_rest, k, k_rest, v, v_rest, q_desc, q_rest_desc, do_desc, do_rest_desc,
            lse + row_offset, delta + row_offset, begins, batch, head, first_of_block, diagonal_end, keys, slope2,
            scale2, drop_seed, head_index, threshold, keep, num_positions,
            BLOCK_Q, D, R, True, ALIBI, STARTS, DROPOUT, PRECISION,
        )  # fmt: skip
        dk_acc, dk_rest, dv_acc, dv_rest = _visit_queries(
            dk_acc, dk_rest, dv_acc, dv_rest, k, k_rest, v, v_rest, q_desc, q_rest_desc, do_desc, do_rest_desc,
            shifted_lse + row_offset, delta + row_offset, begins, batch, head, first_of_block + BLOCK_K,
            tl.minimum(end, num_positions), keys, slope2, scale2, drop_seed, head_index, threshold, keep, num_positions,
            BLOCK_Q, D, R, False, ALIBI, STARTS, DROPOUT, PRECISION,
        )  # fmt: skip

    dk_base = dk + batch.to(tl.int64) * dk_stride_b + kv_head.to(tl.int64) * dk_stride_n
    dv_base = dv + batch.to(tl.int64) * dv_stride_b + kv_head.to(tl.int64) * dv_stride_n
    store_rows(dk_base, keys, dk_stride_s, dk_acc * scale, num_positions, 0, D, HEAD_SIZE)
    store_rows(dv_base, keys, dv_stride_s, dv_acc, num_positions, 0, D, HEAD_SIZE)
    if R:
        store_rows(dk_base, keys, dk_stride_s, dk_rest * scale, num_positions, D, R, HEAD_SIZE)
        store_rows(dv_base, keys, dv_stride_s, dv_rest, num_positions, D, R, HEAD_SIZE)
    if SUMS:
        own = sums + ((batch * num_sums + block) * kv_heads + kv_head).to(tl.int64) * (3 * HEAD_SIZE)
        _store_sums(own + HEAD_SIZE, dk_acc * scale, 0, D, HEAD_SIZE)
        _store_sums(own + 2 * HEAD_SIZE, dv_acc, 0, D, HEAD_SIZE)
        if R:
            _store_sums(own + HEAD_SIZE, dk_rest * scale, D, R, HEAD_SIZE)
            _store_sums(own + 2 * HEAD_SIZE, dv_rest, D, R, HEAD_SIZE)

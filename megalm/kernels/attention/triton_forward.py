"""Forward kernels of the Triton attention core.

Letters: b batch, n heads of queries, s positions, d head size. A head is held as D columns and a rest of R columns,
both powers of two, so that d = 80 costs 64 + 16 and not 128; R is 0 where nothing is saved, and no `rest` is read then.
Exponents are kept in base 2: `scale2` is log2(e) / sqrt(d) and `slope2` is slope * log2(e).

A program owns BLOCK_Q queries of one head. It visits the blocks of keys on the diagonal, which need the causal mask,
then the blocks before them, which need none. ALiBi's bias is formed in registers: on the diagonal as
slope * (key - query), before it as slope * (key - last key of the block) per key and
slope * (last key of the block - query) per query, so that no term is larger than the bias itself.

With ALiBi a block far enough back cannot matter. A score is at most |q| * max |k| / sqrt(d), the row's maximum is at
least the one on the diagonal, and the bias falls by the slope with every key. Keys whose weights sum to less than
2^-BITS of the row's largest weight are not visited if whole blocks of them are like that for all queries of the
program. BITS is 24 in fp32, half a unit in the last place; 16 in 16-bit types, whose weights and results are rounded by
2^-9 (bf16) and 2^-12 (fp16) anyway. `first_key` hands the bound to the backward pass.
"""

from __future__ import annotations

from megalm.kernels.triton_language import jit, tl


@jit
def attention_key_norms(
    k: tl.tensor,
    norms: tl.tensor,
    stride_b: tl.tensor,
    stride_n: tl.tensor,
    stride_s: tl.tensor,
    num_heads: tl.tensor,
    num_positions: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The largest |k|^2 of each block. Shapes: k [b, n, s, d] -> norms [b, n, blocks] fp32."""
    batch_head = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, D)
    base = k + (batch_head // num_heads) * stride_b + (batch_head % num_heads) * stride_n
    offsets = rows.to(tl.int64)[:, None] * stride_s + columns[None, :]
    inside = (rows < num_positions)[:, None] & (columns < HEAD_SIZE)[None, :]
    values = tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.sum(values * values, axis=1), axis=0)
    tl.store(norms + batch_head * tl.num_programs(1) + tl.program_id(1), largest)


@jit
def place_in_grid(num_blocks: tl.tensor, heads_at_once: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The head of a program, counted over batch and heads, and the number of its block.

    The first blocks of some heads come first, then their second blocks, and so on, then other heads: what those few
    heads read again and again stays in the L2 cache, which all heads together would overflow.
    """
    program = tl.program_id(0)
    num_heads = tl.num_programs(0) // num_blocks
    first_head = program // (num_blocks * heads_at_once) * heads_at_once
    heads = tl.minimum(heads_at_once, num_heads - first_head)
    place = program - first_head * num_blocks
    return first_head + place % heads, place // heads


@jit
def kept_weights(
    seed: tl.tensor, head_index: tl.tensor, queries: tl.tensor, keys: tl.tensor, threshold: tl.tensor
) -> tl.tensor:
    """True for the weights that dropout keeps: 31 bits of Philox at (key, query, head) are not below `threshold`.

    A function of the position alone, so that the backward pass draws the mask of the forward pass in any order.
    """
    c0 = keys + queries * 0
    c1 = queries + keys * 0
    c2 = c0 * 0 + head_index
    bits, _, _, _ = tl.philox(seed, c0, c1, c2, c0 * 0, 7)
    return (bits >> 1).to(tl.int32) >= threshold


@jit
def row_products(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The inner product of each row of `a` with its row of `b`, in fp32."""
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), axis=1)


@jit
def store_rows(
    base: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    values: tl.tensor,
    num_positions: tl.tensor,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
) -> None:
    """Store the columns from FIRST on of rows of a head, without those past the end of either."""
    columns = FIRST + tl.arange(0, WIDTH)
    inside = (rows < num_positions)[:, None] & (columns < HEAD_SIZE)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(base + offsets, values.to(base.dtype.element_ty), mask=inside)


@jit
def _first_key(
    squares: tl.tensor,
    peak: tl.tensor,
    rows: tl.tensor,
    slope2: tl.tensor,
    scale2: tl.tensor,
    norms: tl.tensor,
    num_norms: tl.tensor,
    num_positions: tl.tensor,
    BITS: tl.constexpr,
) -> tl.tensor:
    """The first key that any of the rows, of which |q|^2 is given, can see with a weight that counts."""
    largest = 0.0
    for start in range(0, num_norms, 128):
        index = start + tl.arange(0, 128)
        largest = tl.maximum(largest, tl.max(tl.load(norms + index, mask=index < num_norms, other=0.0), axis=0))
    # Both norms are rounded: one part in a thousand is more than that can be.
    bound = tl.sqrt(squares * largest) * scale2 * 1.001
    steep = tl.maximum(slope2, 1e-30)
    # The weights of all keys beyond a distance form a geometric series of ratio 2^-slope2.
    threshold = BITS + tl.log2(1.0 + 1.4427 / steep)
    distance = (bound + threshold - peak) / steep + 1.0
    first = tl.where((rows < num_positions) & (peak > float("-inf")), rows.to(tl.float32) - distance, 3e38)
    earliest = tl.min(first, axis=0)
    return tl.where(slope2 > 0.0, tl.maximum(tl.minimum(earliest, 1e9), 0.0), 0.0).to(tl.int32)


@jit
def _visit(
    acc: tl.tensor,
    acc_rest: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    q_rest: tl.tensor,
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
    BLOCK_K: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ALIBI: tl.constexpr,
    STARTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Online softmax over the blocks of keys from `begin` to `end`. Source: Dao 2023, arXiv:2307.08691."""
    columns = tl.arange(0, BLOCK_K)
    for start in tl.range(begin, end, BLOCK_K):
        k = k_desc.load([batch, kv_head, start, 0]).reshape(BLOCK_K, D)
        t = tl.dot(q, k.T, input_precision=PRECISION)
        if R:
            k_rest = k_rest_desc.load([batch, kv_head, start, D]).reshape(BLOCK_K, R)
            t = tl.dot(q_rest, k_rest.T, t, input_precision=PRECISION)
        t = t * scale2
        keys = start + columns
        row_bias = tl.zeros_like(peak)
        if ALIBI:
            if DIAGONAL:
                t += slope2 * (keys[None, :] - rows[:, None]).to(tl.float32)
            else:
                t += (slope2 * (columns - (BLOCK_K - 1)).to(tl.float32))[None, :]
                row_bias = slope2 * (start + (BLOCK_K - 1) - rows).to(tl.float32)
        if DIAGONAL:
            t = tl.where(keys[None, :] <= rows[:, None], t, float("-inf"))
        if STARTS:
            t = tl.where(keys[None, :] >= starts[:, None], t, float("-inf"))
        higher = tl.maximum(peak, tl.max(t, axis=1) + row_bias)
        finite = higher
        if STARTS:
            finite = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(t - (finite - row_bias)[:, None])
        alpha = tl.exp2(peak - finite)
        total = total * alpha + tl.sum(p, axis=1)
        acc = acc * alpha[:, None]
        if DROPOUT:
            p = tl.where(kept_weights(seed, head_index, rows[:, None], keys[None, :], threshold), p, 0.0)
        v = v_desc.load([batch, kv_head, start, 0]).reshape(BLOCK_K, D)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        if R:
            v_rest = v_rest_desc.load([batch, kv_head, start, D]).reshape(BLOCK_K, R)
            acc_rest = tl.dot(p.to(v.dtype), v_rest, acc_rest * alpha[:, None], input_precision=PRECISION)
        peak = higher
    return acc, acc_rest, peak, total


@jit
def attention_forward(
    q_desc: tl.tensor,
    q_rest_desc: tl.tensor,
    k_desc: tl.tensor,
    k_rest_desc: tl.tensor,
    v_desc: tl.tensor,
    v_rest_desc: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    first_key: tl.tensor,
    slopes: tl.tensor,
    starts: tl.tensor,
    norms: tl.tensor,
    seed: tl.tensor,
    out_stride_b: tl.tensor,
    out_stride_n: tl.tensor,
    out_stride_s: tl.tensor,
    num_heads: tl.tensor,
    num_positions: tl.tensor,
    num_norms: tl.tensor,
    heads_at_once: tl.tensor,
    scale2: tl.tensor,
    threshold: tl.tensor,
    keep: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIBI: tl.constexpr,
    STARTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BITS: tl.constexpr,
) -> None:
    """Outputs and log-sum-exps of BLOCK_Q queries of one head, the long rows of `heads_at_once` heads first.

    Shapes: q [b, n, s, d], k, v [b, n/GROUP, s, d] -> out [b, n, s, d], lse [b, n, blocks * BLOCK_Q] fp32 in base 2,
        first_key [b, n, blocks] int32. slopes [n] fp32, starts [b, s] int32, norms as `attention_key_norms` has them.
    """
    num_blocks = tl.cdiv(num_positions, BLOCK_Q)
    batch_head, turn = place_in_grid(num_blocks, heads_at_once)
    block = num_blocks - 1 - turn
    batch = batch_head // num_heads
    head = batch_head % num_heads
    kv_head = head // GROUP
    first_row = block * BLOCK_Q
    rows = first_row + tl.arange(0, BLOCK_Q)
    inside = rows < num_positions
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
    acc = tl.zeros([BLOCK_Q, D], dtype=tl.float32)
    squares = row_products(q, q) if ALIBI else 0.0
    q_rest, acc_rest = 0.0, 0.0
    if R:
        q_rest = q_rest_desc.load([batch, head, first_row, D]).reshape(BLOCK_Q, R)
        acc_rest = tl.zeros([BLOCK_Q, R], dtype=tl.float32)
        squares += row_products(q_rest, q_rest)
    peak = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    end = tl.minimum(first_row + BLOCK_Q, num_positions)
    acc, acc_rest, peak, total = _visit(
        acc, acc_rest, peak, total, q, q_rest, k_desc, k_rest_desc, v_desc, v_rest_desc, batch, kv_head, first_row, end,
        rows, begins, slope2, scale2, drop_seed, batch_head, threshold,
        BLOCK_K, D, R, True, ALIBI, STARTS, DROPOUT, PRECISION,
    )  # fmt: skip
    low = 0
    if ALIBI:
        kv_index = batch * (num_heads // GROUP) + kv_head
        norms += kv_index * num_norms
        low = _first_key(squares, peak, rows, slope2, scale2, norms, num_norms, num_positions, BITS)
    if STARTS:
        low = tl.maximum(low, tl.min(begins, axis=0))
    low = tl.minimum(low, first_row) // BLOCK_K * BLOCK_K
    tl.store(first_key + batch_head * num_blocks + block, low)
    acc, acc_rest, peak, total = _visit(
        acc, acc_rest, peak, total, q, q_rest, k_desc, k_rest_desc, v_desc, v_rest_desc, batch, kv_head, low, first_row,
        rows, begins, slope2, scale2, drop_seed, batch_head, threshold,
        BLOCK_K, D, R, False, ALIBI, STARTS, DROPOUT, PRECISION,
    )  # fmt: skip

    # A query that sees nothing gives zeros. It has no weights in the backward pass, and neither has one past the end,
    # which spares that pass a mask.
    seen = tl.where(total > 0.0, total, 1.0)
    row_lse = tl.where(inside & (total > 0.0), peak + tl.log2(seen), float("inf"))
    tl.store(lse + batch_head.to(tl.int64) * (num_blocks * BLOCK_Q) + rows, row_lse)
    share = (1.0 / (seen * keep))[:, None]
    base = out + batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_n
    store_rows(base, rows, out_stride_s, acc * share, num_positions, 0, D, HEAD_SIZE)
    if R:
        store_rows(base, rows, out_stride_s, acc_rest * share, num_positions, D, R, HEAD_SIZE)

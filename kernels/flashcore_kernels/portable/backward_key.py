"""The portable backward's second kernel: the gradients of keys and values."""

import triton
import triton.language as tl

from ..dropout import dropout_keep, dropout_keys
from .backward_blocks import NUMBERS, accumulated, load_lse, load_mask, probabilities, row_ranges
from .blocks import BITMAP, load_tile, sequence_bounds, short_sums

# Query blocks that a program looks at at once for those that see its keys.
SCAN = tl.constexpr(128)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def flashcore_query_blocks(Range, Blocks, stride_rb, stride_rs, num_queries, num_keys, BLOCK_M: tl.constexpr):
    """For each block of BLOCK_M queries with a key range each: which keys some of them see, and which all of them.

    Shapes: Range a KeyRange of the `rows` layout, Blocks int32 `[B, cdiv(Q, BLOCK_M), 4]` (lo, hi, full_lo, full_hi).
    Grid: `(cdiv(Q, BLOCK_M), B)`.
    """
    b = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = m < num_queries
    line = Range + b * stride_rb + m * stride_rs
    row_lo = tl.maximum(tl.load(line, mask=valid, other=0), 0)
    row_hi = tl.minimum(tl.load(line + 1, mask=valid, other=0), num_keys)
    sees = valid & (row_lo < row_hi)
    out = Blocks + (b * tl.num_programs(0) + tl.program_id(0)) * 4
    tl.store(out, tl.min(tl.where(sees, row_lo, num_keys), axis=0))
    tl.store(out + 1, tl.max(tl.where(sees, row_hi, 0), axis=0))
    tl.store(out + 2, tl.max(tl.where(valid, row_lo, 0), axis=0))
    tl.store(out + 3, tl.min(tl.where(valid, row_hi, num_keys), axis=0))


@triton.jit
def blocks_that_see(Blocks, num_blocks, n0, BLOCK_N: tl.constexpr):
    """(first, past the last) of the query blocks that may see a key of [n0, n0 + BLOCK_N); (num_blocks, 0) for none."""
    begin = num_blocks
    end = 0
    for j in range(0, num_blocks, SCAN):
        block = j + tl.arange(0, SCAN)
        lo = tl.load(Blocks + block * 4, mask=block < num_blocks, other=0)
        hi = tl.load(Blocks + block * 4 + 1, mask=block < num_blocks, other=0)
        hit = (lo < n0 + BLOCK_N) & (hi > n0) & (lo < hi)
        begin = tl.minimum(begin, tl.min(tl.where(hit, block, num_blocks), axis=0))
        end = tl.maximum(end, tl.max(tl.where(hit, block + 1, 0), axis=0))
    return begin, end


@triton.jit
def in_ranges(n, row_lo, row_hi):
    """[N, M]: which of the keys `n` lie in the queries' ranges [row_lo, row_hi)."""
    return (n[:, None] >= row_lo[None, :]) & (n[:, None] < row_hi[None, :])


@triton.jit
def add_query_block(
    acc_k,  # [N, D] fp32, sum of dS^T Q
    acc_v,  # [N, DV] fp32, sum of P^T dO
    k,  # [N, D]; where EXACT, [N] pointers to its rows
    v,  # [N, DV], likewise
    Q,
    GradOut,
    Lse,
    Weight,
    Delta,  # of this sequence and query head
    stride_qs,
    stride_gs,
    m0,  # first query of the block
    m_lo,
    m_hi,  # queries [m_lo, m_hi) are those that may see a key of the block
    n,  # [N] numbers of the keys
    exists,  # [N] which of them are seen by some query
    Range,
    Blocks,
    b,
    num_queries,
    num_keys,
    first,
    end,
    start,
    left,
    right,
    stride_rb,
    stride_rs,
    mask_keys,  # [N] pointers to the columns of the dense mask
    stride_mq,
    Philox,
    head,
    n0,
    drop_below,
    score_scale,
    cap_scale,
    start_scale,
    keep_scale,
    one,
    edge,  # whether some query may not see some key of the block; read only where CHECK is 2
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
    CHECK: tl.constexpr,  # 1: look which query sees which key; 2: look where `edge`
    RANGE: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOLD: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """(acc_k + dS^T Q, acc_v + P^T dO) over queries [m0, m0 + BLOCK_M) of a head."""
    m = m0 + tl.arange(0, BLOCK_M)  # [M]
    there = (m - m_lo).to(tl.uint32) < (m_hi - m_lo).to(tl.uint32)
    row_lo, row_hi = row_ranges(
        Range, stride_rb, stride_rs, b, m, num_queries, num_keys, first, end, start, left, right, RANGE
    )
    if RANGE == 2:
        there = there & (row_lo < n0 + BLOCK_N) & (row_hi > n0) & (row_lo < row_hi)
    bias = 0.0
    see = there
    if CHECK == 1:
        see = exists[:, None] & there[None, :] & in_ranges(n, row_lo, row_hi)  # [N, M]
        if MASK != 0:
            bias, see = load_mask(mask_keys[:, None] + m.to(tl.int64)[None, :] * stride_mq, see, MASK, EXACT)
        # A query that sees none of these keys may hold NaN, and 0 * NaN is NaN.
        there = there & (tl.max(see.to(tl.int32), axis=0) > 0)
    rows = m
    if CHECK != 1 and HEAD_DIM == BLOCK_D and VALUE_DIM == BLOCK_DV and not EXACT:
        # Offsets that no block changes save instructions for registers.
        rows = tl.arange(0, BLOCK_M)
        Q += (m0 + tl.zeros([], tl.int64)) * stride_qs
        GradOut += (m0 + tl.zeros([], tl.int64)) * stride_gs
    q = load_tile(Q, rows, stride_qs, tl.arange(0, BLOCK_D), there, HEAD_DIM, BLOCK_D, True)  # [M, D]
    do = load_tile(GradOut, rows, stride_gs, tl.arange(0, BLOCK_DV), there, VALUE_DIM, BLOCK_DV, True)  # [M, DV]
    lse = load_lse(Lse, m, there, EXACT or MASK == 2)  # [M]
    delta = tl.load(Delta + m, mask=there, other=0.0)  # [M]
    if EXACT:
        s = short_sums(k, Q, stride_qs, m, there, exists, one, HEAD_DIM, BLOCK_D, True)  # [N, M]
        dp = short_sums(v, GradOut, stride_gs, m, there, exists, one, VALUE_DIM, BLOCK_DV, True)
    else:
        # Sums that begin at what is subtracted from them save registers and instructions.
        begin = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        s = tl.dot(k, tl.trans(q), begin - (lse * start_scale)[None, :] if FOLD else begin)
        dp = tl.dot(v, tl.trans(do), begin if Philox is not None else begin - delta[None, :])
    p, t = probabilities(s, lse[None, :], bias, score_scale, cap_scale, SOFTCAP, MASK, FOLD, EXACT)
    if MASK == 2:
        p *= tl.load(Weight + m, mask=there, other=0.0)[None, :]
    if CHECK == 2:
        if BRANCH:
            if edge:
                p = tl.where(in_ranges(n, row_lo, row_hi), p, 0.0)
        else:
            p = tl.where(in_ranges(n, row_lo, row_hi), p, 0.0)
    elif CHECK == 1:
        p = tl.where(see, p, 0.0)
    dropped = p
    if Philox is not None:
        drop_0, drop_1 = dropout_keys(Philox, head, m)
        keep = dropout_keep(drop_0[None, :], drop_1[None, :], (n - first)[:, None], drop_below)
        dropped = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.fma(tl.where(keep, dp, 0.0), keep_scale + tl.zeros_like(dp), tl.zeros_like(dp) - delta[None, :])
    elif EXACT:
        dp -= delta[None, :]
    acc_v = accumulated(dropped.to(do.dtype), do, acc_v, one, EXACT)
    ds = p * dp
    if SOFTCAP:
        ds *= tl.fma(-t, t, tl.full(t.shape, 1.0, tl.float32))
    # Keys that nobody sees may hold NaN. (Without a range for each query, what they sum up is thrown away at the end.)
    if CHECK == 2 and RANGE == 2:
        if BRANCH:
            if edge:
                ds = tl.where(in_ranges(n, row_lo, row_hi), ds, 0.0)
        else:
            ds = tl.where(in_ranges(n, row_lo, row_hi), ds, 0.0)
    elif CHECK == 1:
        ds = tl.where(see, ds, 0.0)
    acc_k = accumulated(ds.to(q.dtype), q, acc_k, one, EXACT)
    return acc_k, acc_v


@triton.jit(do_not_specialize=NUMBERS)
def flashcore_backward_dkdv(
    Q,
    K,
    V,
    GradOut,
    Lse,
    Weight,
    Delta,
    DK,
    DV,
    Range,
    Blocks,
    Mask,
    Philox,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_gb,
    stride_gh,
    stride_gs,
    stride_dkb,
    stride_dkh,
    stride_dks,
    stride_dvb,
    stride_dvh,
    stride_dvs,
    stride_rb,
    stride_rs,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    num_heads,
    group,
    num_queries,
    num_keys,
    query_start,
    window_left,
    window_right,
    drop_below,
    score_scale,
    cap_scale,
    start_scale,
    scale,
    keep_scale,
    one,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
    RANGE: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOLD: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """dV = P^T dO and dK = scale * dS^T Q for one block of BLOCK_N keys of one KV head (see flashcore_backward_dq).

    The heads of the group follow one another, and in each its query blocks: one order of summing, without atomics.
    Key blocks lie on a grid from the sequence's first key, query blocks on one from the query that stands there, so
    that padding moves neither.

    Shapes: as in `flashcore_backward_dq`; DK `[B, Hkv, K, D]`, DV `[B, Hkv, K, DV]`; Blocks: see
    `flashcore_query_blocks`, for RANGE 2.
    Grid: `(key_tiles * B * Hkv,)` with cdiv(K, BLOCK_N) tiles, one more with RANGE 1: there the first may lie before
    the sequence's first key. The first keys come first: under causal attention they take longest.
    """
    num_kv_heads = num_heads // group
    num_tiles = tl.cdiv(num_keys, BLOCK_N) + (1 if RANGE == 1 else 0)
    pid = tl.program_id(0)
    unit = pid // num_tiles
    b = (unit // num_kv_heads).to(tl.int64)
    kv_head = (unit % num_kv_heads).to(tl.int64)
    first, end, start, left, right, holes = sequence_bounds(
        Range, stride_rb, b, num_keys, query_start, window_left, window_right, RANGE == 1
    )
    before = first % BLOCK_N
    n0 = pid % num_tiles * BLOCK_N + before - tl.where(before > 0, BLOCK_N, 0)
    n = n0 + tl.arange(0, BLOCK_N)  # [N]
    is_key = (n >= 0) & (n < num_keys)
    exists = is_key
    phase = 0
    if RANGE == 2:
        num_blocks = tl.cdiv(num_queries, BLOCK_M)
        Blocks += b * num_blocks * 4
        begin_block, end_block = blocks_that_see(Blocks, num_blocks, n0, BLOCK_N)
        m_lo = begin_block * BLOCK_M
        m_hi = tl.minimum(end_block * BLOCK_M, num_queries)
        full_lo = 0
        full_hi = 0
    else:
        # The keys that some query sees, then the queries [m_lo, m_hi) that see one of the block's, and those that see
        # all of these, [full_lo, full_hi).
        exists = (n >= tl.maximum(first, start - left)) & (n < tl.minimum(end, start + num_queries + right))
        n_lo = tl.maximum(n0, first)
        n_hi = tl.minimum(n0 + BLOCK_N, end)
        m_lo = tl.maximum(n_lo - right - start, 0)
        m_hi = tl.where(n_lo < n_hi, tl.minimum(n_hi + left - start, num_queries), 0)
        full_lo = n_hi - 1 - right - start
        full_hi = n_lo + left - start + 1
        phase = tl.maximum(first - start, 0) % BLOCK_M
    if RANGE == 1:
        word = tl.load(Range + b * stride_rb + BITMAP + (n >> 5), mask=exists & (holes + n * 0 != 0), other=-1)
        exists = exists & (((word >> (n & 31)) & 1) == 1)
    m_hi = tl.maximum(m_hi, m_lo)
    # m_lo is not negative, and phase less than a block.
    m_begin = (m_lo - phase + BLOCK_M) // BLOCK_M * BLOCK_M + phase - BLOCK_M
    steps = group * tl.where(m_lo < m_hi, tl.cdiv(m_hi - m_begin, BLOCK_M), 0)

    k_head = K + b * stride_kb + kv_head * stride_kh
    v_head = V + b * stride_vb + kv_head * stride_vh
    if EXACT:
        k = k_head + n.to(tl.int64) * stride_ks  # [N]
        v = v_head + n.to(tl.int64) * stride_vs
    else:
        k = load_tile(k_head, n, stride_ks, tl.arange(0, BLOCK_D), exists, HEAD_DIM, BLOCK_D, True)  # [N, D]
        v = load_tile(v_head, n, stride_vs, tl.arange(0, BLOCK_DV), exists, VALUE_DIM, BLOCK_DV, True)  # [N, DV]
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    h = kv_head * group
    m0 = m_begin
    looked = steps * 0
    if MASK != 0:
        looked = steps
    elif RANGE == 1:
        looked = tl.where(holes != 0, steps, 0)
    # One loop over heads and query blocks: the software pipeline of an inner one would begin anew with each head.
    if MASK != 0 or RANGE == 1:
        for _ in range(0, looked):
            at = (b * num_heads + h) * num_queries
            mask_keys = n
            if MASK != 0:
                mask_keys = Mask + b * stride_mb + h * stride_mh + n.to(tl.int64) * stride_mk  # [N]
            acc_k, acc_v = add_query_block(
                acc_k, acc_v, k, v, Q + b * stride_qb + h * stride_qh, GradOut + b * stride_gb + h * stride_gh,
                Lse + at, (Weight + at if MASK == 2 else Lse), Delta + at, stride_qs, stride_gs, m0, m_lo, m_hi, n,
                exists, Range, Blocks, b, num_queries, num_keys, first, end, start, left, right, stride_rb, stride_rs,
                mask_keys, stride_mq, Philox,
                (b * num_heads + h).to(tl.int32), n0, drop_below, score_scale, cap_scale, start_scale, keep_scale, one,
                True, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, EXACT, 1, RANGE, MASK, SOFTCAP, FOLD,
                BRANCH,
            )  # fmt: skip
            m0 += BLOCK_M
            h = tl.where(m0 < m_hi, h, h + 1)
            m0 = tl.where(m0 < m_hi, m0, m_begin)
    if MASK == 0:
        for _ in range(looked, steps):
            at = (b * num_heads + h) * num_queries
            if RANGE == 2:
                block = Blocks + m0 // BLOCK_M * 4
                edge = (tl.load(block + 2) > n0) | (tl.load(block + 3) < n0 + BLOCK_N)
            else:
                edge = (m0 < full_lo) | (m0 + BLOCK_M > full_hi)
            acc_k, acc_v = add_query_block(
                acc_k, acc_v, k, v, Q + b * stride_qb + h * stride_qh, GradOut + b * stride_gb + h * stride_gh,
                Lse + at, Lse, Delta + at, stride_qs, stride_gs, m0, m_lo, m_hi, n, exists, Range, Blocks, b,
                num_queries, num_keys, first, end, start, left, right, stride_rb, stride_rs, n, stride_mq, Philox,
                (b * num_heads + h).to(tl.int32), n0, drop_below, score_scale, cap_scale, start_scale, keep_scale, one,
                edge, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, EXACT, 2, RANGE, MASK, SOFTCAP, FOLD,
                BRANCH,
            )  # fmt: skip
            m0 += BLOCK_M
            h = tl.where(m0 < m_hi, h, h + 1)
            m0 = tl.where(m0 < m_hi, m0, m_begin)

    # Keys that nobody sees: zeros, whatever they hold.
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    acc_k = tl.where(exists[:, None], acc_k * scale, 0.0)
    acc_v = tl.where(exists[:, None], acc_v, 0.0)
    dk_rows = DK + b * stride_dkb + kv_head * stride_dkh + n.to(tl.int64) * stride_dks
    dv_rows = DV + b * stride_dvb + kv_head * stride_dvh + n.to(tl.int64) * stride_dvs
    tl.store(dk_rows[:, None] + offs_d[None, :], acc_k.to(DK.dtype.element_ty),
             mask=is_key[:, None] & (offs_d[None, :] < HEAD_DIM))  # fmt: skip
    tl.store(dv_rows[:, None] + offs_dv[None, :], acc_v.to(DV.dtype.element_ty),
             mask=is_key[:, None] & (offs_dv[None, :] < VALUE_DIM))  # fmt: skip

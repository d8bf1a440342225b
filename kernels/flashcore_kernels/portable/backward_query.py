"""The portable backward's first kernel: the gradient of the queries, and each row's delta for the others."""

import triton
import triton.language as tl

from ..dropout import dropout_keep, dropout_keys
from .backward_blocks import NUMBERS, accumulated, load_lse, load_mask, probabilities, row_ranges
from .blocks import BITMAP, load_tile, seen, sequence_bounds, short_sums


@triton.jit
def add_key_block(
    acc,  # [M, D] fp32, sum of dS K
    q,  # [M, D]; where EXACT, [M] pointers to its rows
    do,  # [M, DV], likewise
    lse,  # [M], see load_lse
    weight,  # [M], see flashcore_backward_shift; read only where MASK is 2
    delta,  # [M]
    K,
    V,  # of this sequence and KV head
    stride_ks,
    stride_vs,
    n,  # first key of the block
    lo,
    hi,  # keys [lo, hi) are the ones that some row sees
    row_lo,
    row_hi,  # [M] each row sees keys [row_lo, row_hi)
    sees,  # [M] which rows see any
    bitmap,
    holes,
    mask_rows,  # [M] pointers to the rows of the dense mask
    stride_mk,
    drop_0,
    drop_1,  # [M] `dropout_keys` of the rows, or None
    first,  # key from which dropout counts
    drop_below,
    score_scale,
    cap_scale,
    start_scale,
    keep_scale,
    one,
    edge,  # whether some row may not see some key of the block; read only where CHECK is 2
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
    CHECK: tl.constexpr,  # 0: every row sees every key of the block; 1: look which; 2: look where `edge`
    HAS_RANGE: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOLD: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """acc + dS K over keys [n, n + BLOCK_N)."""
    cols = n + tl.arange(0, BLOCK_N)  # [N]
    present = (cols - lo).to(tl.uint32) < (hi - lo).to(tl.uint32)
    bias = 0.0
    see = present
    if CHECK == 1:
        if HAS_RANGE:
            word = tl.load(bitmap + (cols >> 5), mask=present & (holes + cols * 0 != 0), other=-1)
            present = present & (((word >> (cols & 31)) & 1) == 1)
        see = seen(cols, present, row_lo, row_hi) & sees[:, None]  # [M, N]
        if MASK != 0:
            bias, see = load_mask(mask_rows[:, None] + cols.to(tl.int64)[None, :] * stride_mk, see, MASK, EXACT)
        # A key that no row sees may hold NaN, and 0 * NaN is NaN.
        present = present & (tl.max(see.to(tl.int32), axis=0) > 0)
    rows = cols
    if CHECK != 1 and HEAD_DIM == BLOCK_D and VALUE_DIM == BLOCK_DV and not EXACT:
        rows = tl.arange(0, BLOCK_N)
        K += (n + tl.zeros([], tl.int64)) * stride_ks
        V += (n + tl.zeros([], tl.int64)) * stride_vs
    k = load_tile(K, rows, stride_ks, tl.arange(0, BLOCK_D), present, HEAD_DIM, BLOCK_D, CHECK)  # [N, D]
    if EXACT:
        s = short_sums(q, K, stride_ks, cols, present, sees, one, HEAD_DIM, BLOCK_D, CHECK)  # [M, N]
        dp = short_sums(do, V, stride_vs, cols, present, sees, one, VALUE_DIM, BLOCK_DV, CHECK)
    else:
        v = load_tile(V, rows, stride_vs, tl.arange(0, BLOCK_DV), present, VALUE_DIM, BLOCK_DV, CHECK)  # [N, DV]
        # Sums that begin at what is subtracted from them save registers and instructions.
        begin = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
        s = tl.dot(q, tl.trans(k), begin - (lse * start_scale)[:, None] if FOLD else begin)
        dp = tl.dot(do, tl.trans(v), begin if drop_0 is not None else begin - delta[:, None])
    p, t = probabilities(s, lse[:, None], bias, score_scale, cap_scale, SOFTCAP, MASK, FOLD, EXACT)
    if MASK == 2:
        p *= weight[:, None]
    if drop_0 is not None:
        keep = dropout_keep(drop_0[:, None], drop_1[:, None], (cols - first)[None, :], drop_below)
        dp = tl.fma(tl.where(keep, dp, 0.0), keep_scale + tl.zeros_like(dp), tl.zeros_like(dp) - delta[:, None])
    elif EXACT:
        dp -= delta[:, None]
    ds = p * dp
    if SOFTCAP:
        ds *= tl.fma(-t, t, tl.full(t.shape, 1.0, tl.float32))
    if CHECK == 2:
        if BRANCH:
            if edge:
                ds = tl.where(seen(cols, present, row_lo, row_hi), ds, 0.0)
        else:
            ds = tl.where(seen(cols, present, row_lo, row_hi), ds, 0.0)
    elif CHECK == 1:
        ds = tl.where(see, ds, 0.0)
    return accumulated(ds.to(k.dtype), k, acc, one, EXACT)


@triton.jit(do_not_specialize=NUMBERS)
def flashcore_backward_dq(
    Q,
    K,
    V,
    Out,
    GradOut,
    GradLse,
    Lse,
    Weight,
    Delta,
    DQ,
    Range,
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
    stride_ob,
    stride_oh,
    stride_os,
    stride_gb,
    stride_gh,
    stride_gs,
    stride_dqb,
    stride_dqh,
    stride_dqs,
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
    EXACT: tl.constexpr,  # fp32
    RANGE: tl.constexpr,  # 0 none, 1 a line a sequence, 2 a line a query
    MASK: tl.constexpr,  # 0 none, 1 bool, 2 float
    SOFTCAP: tl.constexpr,
    FOLD: tl.constexpr,  # the scores' sums begin at -lse
    BRANCH: tl.constexpr,  # jump over the checks of blocks that are not at an edge
):
    """dQ = scale * dS K for one tile of BLOCK_M queries of one head, with

        P = exp(score - lse), dP = dO V^T, delta = rowsum(dO * O) - dLse, dS = P * (dP - delta) * (1 - tanh^2).

    Shapes: Q, DQ `[B, H, Q, D]`, K `[B, Hkv, K, D]`, V `[B, Hkv, K, DV]`, Out, GradOut `[B, H, Q, DV]`, Lse, GradLse,
    Delta `[B, H, Q]` fp32 (Delta is written; with MASK 2 Lse and Weight are what `flashcore_backward_shift` wrote), the
    rest as in `flashcore_forward`.
    Grid: `(cdiv(Q, BLOCK_M) * B * H,)`, the last queries first.
    """
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    pid = tl.program_id(0)
    bh = pid // num_tiles
    tile = num_tiles - 1 - pid % num_tiles
    b = (bh // num_heads).to(tl.int64)
    h = bh % num_heads
    kv_head = (h // group).to(tl.int64)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    row_valid = offs_m < num_queries
    first, end, start, left, right, holes = sequence_bounds(
        Range, stride_rb, b, num_keys, query_start, window_left, window_right, RANGE == 1
    )
    row_lo, row_hi = row_ranges(
        Range, stride_rb, stride_rs, b, offs_m, num_queries, num_keys, first, end, start, left, right, RANGE
    )
    sees = row_lo < row_hi  # [M]
    # Keys [lo, hi) are seen by some row of the tile, keys [full_lo, full_hi) by all that are queries.
    lo = tl.min(tl.where(sees, row_lo, num_keys), axis=0)
    hi = tl.max(tl.where(sees, row_hi, 0), axis=0)
    full_lo = tl.max(tl.where(row_valid, row_lo, 0), axis=0)
    full_hi = tl.min(tl.where(row_valid, row_hi, num_keys), axis=0)
    # Blocks lie on a grid that starts at the sequence's first key, so that padding does not move them.
    n_begin = first + tl.maximum(lo - first, 0) // BLOCK_N * BLOCK_N
    n_full = tl.minimum(first + tl.cdiv(tl.maximum(full_lo - first, 0), BLOCK_N) * BLOCK_N, hi)
    n_edge = tl.maximum(tl.minimum(first + tl.maximum(full_hi - first, 0) // BLOCK_N * BLOCK_N, hi), n_full)
    # Blocks [n_begin, n_looked) are checked key by key, as in the forward.
    n_looked = n_begin
    n_last = hi
    if MASK != 0:
        n_looked = hi
    elif RANGE == 2:
        n_looked = n_full
        n_last = n_edge
    elif RANGE == 1:
        n_looked = tl.where(holes != 0, hi, n_begin)

    # What no row's answer depends on is not read: it may hold NaN.
    do_head = GradOut + b * stride_gb + h.to(tl.int64) * stride_gh
    out_head = Out + b * stride_ob + h.to(tl.int64) * stride_oh
    offs_dv = tl.arange(0, BLOCK_DV)
    do = load_tile(do_head, offs_m, stride_gs, offs_dv, sees, VALUE_DIM, BLOCK_DV, True)  # [M, DV]
    out = load_tile(out_head, offs_m, stride_os, offs_dv, sees, VALUE_DIM, BLOCK_DV, True)  # [M, DV]
    # Of a query that sees its sink alone, because a mask or holes hide all of its keys, the output is exactly 0.
    delta = tl.sum(tl.where(out == 0.0, 0.0, do.to(tl.float32) * out.to(tl.float32)), axis=1)  # [M]
    at = bh.to(tl.int64) * num_queries
    if GradLse is not None:
        delta -= tl.load(GradLse + at + offs_m, mask=row_valid, other=0.0)
    tl.store(Delta + at + offs_m, delta, mask=row_valid)
    lse = load_lse(Lse + at, offs_m, sees, EXACT or MASK == 2)  # [M]
    weight = lse
    if MASK == 2:
        weight = tl.load(Weight + at + offs_m, mask=sees, other=0.0)  # [M]
    q_head = Q + b * stride_qb + h.to(tl.int64) * stride_qh
    if EXACT:
        q = q_head + offs_m.to(tl.int64) * stride_qs  # [M]
        do = do_head + offs_m.to(tl.int64) * stride_gs
    else:
        q = load_tile(q_head, offs_m, stride_qs, tl.arange(0, BLOCK_D), sees, HEAD_DIM, BLOCK_D, True)  # [M, D]

    k_head = K + b * stride_kb + kv_head * stride_kh
    v_head = V + b * stride_vb + kv_head * stride_vh
    bitmap = Range + b * stride_rb + BITMAP if RANGE == 1 else Range
    mask_rows = offs_m
    if MASK != 0:
        mask_rows = Mask + b * stride_mb + h.to(tl.int64) * stride_mh + offs_m.to(tl.int64) * stride_mq  # [M]
    drop_0 = None
    drop_1 = None
    if Philox is not None:
        drop_0, drop_1 = dropout_keys(Philox, bh, offs_m)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if MASK != 0 or RANGE != 0:
        for n in range(n_begin, n_looked, BLOCK_N):
            acc = add_key_block(
                acc, q, do, lse, weight, delta, k_head, v_head, stride_ks, stride_vs, n, lo, hi, row_lo, row_hi, sees,
                bitmap, holes, mask_rows, stride_mk, drop_0, drop_1, first, drop_below, score_scale, cap_scale,
                start_scale, keep_scale, one, True, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, EXACT, 1,
                RANGE == 1, MASK,
                SOFTCAP, FOLD, BRANCH,
            )  # fmt: skip
    if MASK == 0:
        for n in range(n_looked, n_last, BLOCK_N):
            edge = (n < n_full) | (n >= n_edge)
            acc = add_key_block(
                acc, q, do, lse, weight, delta, k_head, v_head, stride_ks, stride_vs, n, lo, hi, row_lo, row_hi, sees,
                bitmap, holes, mask_rows, stride_mk, drop_0, drop_1, first, drop_below, score_scale, cap_scale,
                start_scale, keep_scale, one, edge, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, EXACT,
                0 if RANGE == 2 else 2, False, MASK, SOFTCAP, FOLD, BRANCH,
            )  # fmt: skip
    if MASK == 0 and RANGE == 2:
        for n in range(n_edge, hi, BLOCK_N):
            acc = add_key_block(
                acc, q, do, lse, weight, delta, k_head, v_head, stride_ks, stride_vs, n, lo, hi, row_lo, row_hi, sees,
                bitmap, holes, mask_rows, stride_mk, drop_0, drop_1, first, drop_below, score_scale, cap_scale,
                start_scale, keep_scale, one, True, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, EXACT, 1,
                False, MASK,
                SOFTCAP, FOLD, BRANCH,
            )  # fmt: skip

    offs_d = tl.arange(0, BLOCK_D)
    dq_rows = DQ + b * stride_dqb + h.to(tl.int64) * stride_dqh + offs_m.to(tl.int64) * stride_dqs
    keep = row_valid[:, None] & (offs_d[None, :] < HEAD_DIM)
    tl.store(dq_rows[:, None] + offs_d[None, :], (acc * scale).to(DQ.dtype.element_ty), mask=keep)

"""The portable backward's third kernel: the gradient of a mask that is added to the scores, where it is asked for."""

import triton
import triton.language as tl

from ..dropout import dropout_keep, dropout_keys
from .backward_blocks import NUMBERS, load_lse, load_mask, probabilities, row_ranges
from .blocks import BITMAP, load_tile, sequence_bounds, short_sums


@triton.jit(do_not_specialize=NUMBERS)
def flashcore_backward_mask(
    Q,
    K,
    V,
    GradOut,
    Lse,
    Weight,
    Delta,
    DMask,
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
    stride_gb,
    stride_gh,
    stride_gs,
    stride_rb,
    stride_rs,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    mask_batch,
    mask_heads,
    batch_size,
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
    SOFTCAP: tl.constexpr,
    SUM_M: tl.constexpr,  # the mask is one row for all queries
    SUM_N: tl.constexpr,  # ... one column for all keys
):
    """dMask = sum of P * (dP - delta) over the batch, heads, queries and keys that share an element of the mask.

    A program sums up a tile of the mask in registers, sequence after sequence, head after head and, where the mask is
    broadcast over them, queries and keys: one order, no atomics, and no memory beside the answer.

    Shapes: as in `flashcore_backward_dq`; DMask contiguous, fp32, of the mask's own shape
    `[mask_batch, mask_heads, Q or 1, K or 1]`.
    Grid: `(n_tiles * m_tiles * mask_batch * mask_heads,)`, with one tile along an axis that is summed up.
    """
    m_tiles = 1 if SUM_M else tl.cdiv(num_queries, BLOCK_M)
    n_tiles = 1 if SUM_N else tl.cdiv(num_keys, BLOCK_N)
    row = tl.program_id(0) // n_tiles
    plane = row // m_tiles
    mask_b = plane // mask_heads
    mask_h = plane % mask_heads
    m_begin = row % m_tiles * BLOCK_M
    n_begin = tl.program_id(0) % n_tiles * BLOCK_N
    m_end = num_queries if SUM_M else tl.minimum(m_begin + BLOCK_M, num_queries)
    n_end = num_keys if SUM_N else tl.minimum(n_begin + BLOCK_N, num_keys)
    b_end = tl.where(mask_batch == 1, batch_size, mask_b + 1)
    h_end = tl.where(mask_heads == 1, num_heads, mask_h + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b_index in range(mask_b, b_end):
        b = b_index + tl.zeros([], tl.int64)
        first, end, start, left, right, holes = sequence_bounds(
            Range, stride_rb, b, num_keys, query_start, window_left, window_right, RANGE == 1
        )
        for h_index in range(mask_h, h_end):
            h = h_index + tl.zeros([], tl.int64)
            q_head = Q + b * stride_qb + h * stride_qh
            do_head = GradOut + b * stride_gb + h * stride_gh
            k_head = K + b * stride_kb + (h // group) * stride_kh
            v_head = V + b * stride_vb + (h // group) * stride_vh
            at = (b * num_heads + h) * num_queries
            for m0 in range(m_begin, m_end, BLOCK_M):
                m = m0 + tl.arange(0, BLOCK_M)  # [M]
                row_lo, row_hi = row_ranges(
                    Range, stride_rb, stride_rs, b, m, num_queries, num_keys, first, end, start, left, right, RANGE
                )
                sees = row_lo < row_hi
                lo = tl.maximum(tl.min(tl.where(sees, row_lo, num_keys), axis=0), n_begin)
                hi = tl.minimum(tl.max(tl.where(sees, row_hi, 0), axis=0), n_end)
                lse = load_lse(Lse + at, m, sees, True)
                weight = tl.load(Weight + at + m, mask=sees, other=0.0)
                delta = tl.load(Delta + at + m, mask=sees, other=0.0)
                mask_rows = Mask + b * stride_mb + h * stride_mh + m.to(tl.int64) * stride_mq  # [M]
                for n0 in range(n_begin + tl.maximum(lo - n_begin, 0) // BLOCK_N * BLOCK_N, hi, BLOCK_N):
                    n = n0 + tl.arange(0, BLOCK_N)  # [N]
                    present = (n >= lo) & (n < hi)
                    if RANGE == 1:
                        word = tl.load(Range + b * stride_rb + BITMAP + (n >> 5), mask=present & (holes + n * 0 != 0),
                                       other=-1)  # fmt: skip
                        present = present & (((word >> (n & 31)) & 1) == 1)
                    see = present[None, :] & (n[None, :] >= row_lo[:, None]) & (n[None, :] < row_hi[:, None])
                    bias, see = load_mask(
                        mask_rows[:, None] + n.to(tl.int64)[None, :] * stride_mk, see, 2, EXACT
                    )  # [M, N]
                    if EXACT:
                        q_rows = q_head + m.to(tl.int64) * stride_qs
                        do_rows = do_head + m.to(tl.int64) * stride_gs
                        s = short_sums(q_rows, k_head, stride_ks, n, present, sees, one, HEAD_DIM, BLOCK_D, True)
                        dp = short_sums(do_rows, v_head, stride_vs, n, present, sees, one, VALUE_DIM, BLOCK_DV, True)
                    else:
                        offs_d = tl.arange(0, BLOCK_D)
                        offs_dv = tl.arange(0, BLOCK_DV)
                        q = load_tile(q_head, m, stride_qs, offs_d, sees, HEAD_DIM, BLOCK_D, True)  # [M, D]
                        do = load_tile(do_head, m, stride_gs, offs_dv, sees, VALUE_DIM, BLOCK_DV, True)  # [M, DV]
                        k = load_tile(k_head, n, stride_ks, offs_d, present, HEAD_DIM, BLOCK_D, True)  # [N, D]
                        v = load_tile(v_head, n, stride_vs, offs_dv, present, VALUE_DIM, BLOCK_DV, True)  # [N, DV]
                        s = tl.dot(q, tl.trans(k))
                        dp = tl.dot(do, tl.trans(v))
                    p, t = probabilities(s, lse[:, None], bias, score_scale, cap_scale, SOFTCAP, 2, False, EXACT)
                    p *= weight[:, None]
                    if Philox is not None:
                        drop_0, drop_1 = dropout_keys(Philox, (at // num_queries).to(tl.int32), m)
                        keep = dropout_keep(drop_0[:, None], drop_1[:, None], (n - first)[None, :], drop_below)
                        dp = tl.where(keep, dp * keep_scale, 0.0)
                    # What is not seen may be NaN.
                    acc += tl.where(see, p * (dp - delta[:, None]), 0.0)
    m = m_begin + tl.arange(0, BLOCK_M)
    n = n_begin + tl.arange(0, BLOCK_N)
    columns = 1 if SUM_N else num_keys
    out = DMask + plane.to(tl.int64) * (1 if SUM_M else num_queries) * columns
    if SUM_M and SUM_N:
        tl.store(out, tl.sum(tl.sum(acc, axis=1), axis=0))
    elif SUM_M:
        tl.store(out + n, tl.sum(acc, axis=0), mask=n < num_keys)
    elif SUM_N:
        tl.store(out + m, tl.sum(acc, axis=1), mask=m < num_queries)
    else:
        tl.store(out + m.to(tl.int64)[:, None] * columns + n[None, :], acc,
                 mask=(m < num_queries)[:, None] & (n < num_keys)[None, :])  # fmt: skip

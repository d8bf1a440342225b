"""Rows whose log-sum-exp is too coarse to make probabilities from, which additive masks bring about."""

import triton
import triton.language as tl

from .backward_blocks import LOG2_E, NUMBERS, load_lse, load_mask, row_ranges
from .blocks import BITMAP, load_tile, power_of_2, sequence_bounds, short_sums, tanh

# From here on an fp32 log-sum-exp is off by 6e-5 and more, and so is each probability.
COARSE_LSE = tl.constexpr(1024.0)


@triton.jit(do_not_specialize=NUMBERS)
def flashcore_backward_shift(
    Q,
    K,
    Lse,
    Shift,
    Weight,
    Range,
    Mask,
    Sinks,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
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
    one,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
    RANGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Shift and Weight such that a row's probabilities are Weight * exp(score - Shift).

    That is its lse and 1, as long as the lse has digits. A bias of finfo.min on all keys of a row leaves none: the sum
    of the exponentials is lost beside it. Then it is the row's largest score, and one over the sum, made anew.

    Shapes: as in `flashcore_backward_dq`; Shift (in the units of `load_lse`), Weight `[B, H, Q]` fp32.
    Grid: `(cdiv(Q, BLOCK_M) * B * H,)`.
    """
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    bh = tl.program_id(0) // num_tiles
    b = (bh // num_heads).to(tl.int64)
    h = (bh % num_heads).to(tl.int64)
    m = tl.program_id(0) % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    first, end, start, left, right, holes = sequence_bounds(
        Range, stride_rb, b, num_keys, query_start, window_left, window_right, RANGE == 1
    )
    row_lo, row_hi = row_ranges(
        Range, stride_rb, stride_rs, b, m, num_queries, num_keys, first, end, start, left, right, RANGE
    )
    sees = row_lo < row_hi
    at = bh.to(tl.int64) * num_queries
    lse = tl.load(Lse + at + m, mask=sees, other=float("-inf"))
    shift = load_lse(Lse + at, m, sees, EXACT)
    weight = tl.full([BLOCK_M], 1.0, tl.float32)
    coarse = (lse > float("-inf")) & (tl.abs(lse) > COARSE_LSE)
    if tl.max(coarse.to(tl.int32), axis=0) > 0:
        lo = tl.min(tl.where(sees, row_lo, num_keys), axis=0)
        hi = tl.max(tl.where(sees, row_hi, 0), axis=0)
        q_head = Q + b * stride_qb + h * stride_qh
        k_head = K + b * stride_kb + (h // group) * stride_kh
        mask_rows = Mask + b * stride_mb + h * stride_mh + m.to(tl.int64) * stride_mq  # [M]
        # To units of log2, for power_of_2.
        to_log2 = 1.0
        if EXACT:
            to_log2 = LOG2_E
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if Sinks is not None:
            sink = tl.load(Sinks + h).to(tl.float32)
            largest = tl.maximum(largest, sink if EXACT else sink * LOG2_E)
            total += tl.where(largest > float("-inf"), 1.0, 0.0)
        for n0 in range(lo, hi, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)  # [N]
            present = n < hi
            if RANGE == 1:
                word = tl.load(Range + b * stride_rb + BITMAP + (n >> 5), mask=present & (holes + n * 0 != 0), other=-1)
                present = present & (((word >> (n & 31)) & 1) == 1)
            see = present[None, :] & (n[None, :] >= row_lo[:, None]) & (n[None, :] < row_hi[:, None])  # [M, N]
            bias, see = load_mask(mask_rows[:, None] + n.to(tl.int64)[None, :] * stride_mk, see, 2, EXACT)
            if EXACT:
                q_rows = q_head + m.to(tl.int64) * stride_qs
                s = short_sums(q_rows, k_head, stride_ks, n, present, sees, one, HEAD_DIM, BLOCK_D, True)
            else:
                q = load_tile(q_head, m, stride_qs, tl.arange(0, BLOCK_D), sees, HEAD_DIM, BLOCK_D, True)  # [M, D]
                k = load_tile(k_head, n, stride_ks, tl.arange(0, BLOCK_D), present, HEAD_DIM, BLOCK_D, True)  # [N, D]
                s = tl.dot(q, tl.trans(k))
            unit = score_scale
            if SOFTCAP:
                s = tanh(s * score_scale, EXACT)
                unit = cap_scale
            x = tl.where(see, tl.fma(s, unit + tl.zeros_like(s), bias), float("-inf"))
            larger = tl.maximum(largest, tl.max(x, axis=1))
            finite = tl.where(larger == float("-inf"), 0.0, larger)
            total = total * power_of_2((largest - finite) * to_log2, EXACT)
            total += tl.sum(power_of_2((x - finite[:, None]) * to_log2, EXACT), axis=1)
            largest = larger
        shift = tl.where(coarse, largest, shift)
        weight = tl.where(coarse, 1.0 / total, weight)
    valid = m < num_queries
    tl.store(Shift + at + m, shift, mask=valid)
    tl.store(Weight + at + m, weight, mask=valid)

"""The portable Triton forward: prefill, encoders, any mask, any GPU that Triton compiles for."""

import torch
import triton
import triton.language as tl

from ..dropout import drop_threshold, dropout_keys
from ..problem import Inputs, Problem
from ..runtime.launch import Launch
from .blocks import (
    BITMAP,
    attend_block,
    finish_rows,
    load_tile,
    mask_number,
    mask_strides,
    normalised,
    sequence_bounds,
)
from .choose import ForwardConfig


@triton.jit(do_not_specialize=["num_queries", "num_keys", "query_start", "window_left", "window_right", "drop_below"])
def flashcore_forward(
    Q,
    K,
    V,
    Out,
    Lse,
    Range,
    Mask,
    Sinks,
    KeyScale,
    ValueScale,
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
    keep_scale,
    one,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    BLOCK_DV1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,  # fp32
    RANGE: tl.constexpr,  # 0 none, 1 a line a sequence, 2 a line a query
    MASK: tl.constexpr,  # 0 none, 1 bool, 2 float; 3 and 4: bool and float, one row for all queries
    HAS_SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """out = softmax(cap(scale * q k^T) + mask) v, for one tile of BLOCK_M queries of one head.

    Shapes: Q `[B, H, Q, D]`, K `[B, Hkv, K, D]`, V `[B, Hkv, K, DV]`, Out `[B, H, Q, DV]`, Lse `[B, H, Q]` fp32,
    Range a KeyRange, Mask `[B, H, Q, K]` (strides may be 0), Sinks `[H]`. K and V in e4m3 are multiplied with KeyScale
    and ValueScale, fp32 `[B, Hkv]`: in fp16, which holds every e4m3 value, the scales on the scores and the output.
    With Philox, weights are dropped (see dropout.py), and the output is multiplied with keep_scale.
    Grid: `(cdiv(Q, BLOCK_M) * B * H,)`, the last queries first: under causal attention they take longest.
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
    if RANGE == 2:
        line = Range + b * stride_rb + offs_m * stride_rs
        row_lo = tl.maximum(tl.load(line, mask=row_valid, other=0), 0)
        row_hi = tl.minimum(tl.load(line + 1, mask=row_valid, other=0), num_keys)
        first = 0
        holes = 0
    else:
        first, end, start, left, right, holes = sequence_bounds(
            Range, stride_rb, b, num_keys, query_start, window_left, window_right, RANGE == 1
        )
        row_lo = tl.maximum(first, start + offs_m - left)
        row_hi = tl.minimum(end, start + offs_m + right + 1)
    # Keys [lo, hi) are seen by some row of the tile, keys [full_lo, full_hi) by all of them.
    if RANGE == 2:
        some = row_valid & (row_lo < row_hi)
        lo = tl.min(tl.where(some, row_lo, num_keys), axis=0)
        hi = tl.max(tl.where(some, row_hi, 0), axis=0)
        full_lo = tl.max(tl.where(row_valid, row_lo, 0), axis=0)
        full_hi = tl.min(tl.where(row_valid, row_hi, num_keys), axis=0)
    else:
        # Neither end of a row's keys moves back from row to row, so the first and the last row say it.
        top = tile * BLOCK_M
        bottom = tl.minimum(top + BLOCK_M, num_queries) - 1
        full_lo = tl.maximum(first, start + bottom - left)
        full_hi = tl.minimum(end, start + top + right + 1)
        # From here on the first and the last that see a key.
        top = tl.maximum(top, first - start - right)
        bottom = tl.minimum(bottom, end - 1 - start + left)
        some = (top <= bottom) & (first < end)
        lo = tl.where(some, tl.maximum(first, start + top - left), num_keys)
        hi = tl.where(some, tl.minimum(end, start + bottom + right + 1), 0)
    # Blocks lie on a grid that starts at the sequence's first key, so that padding does not move them.
    n_begin = first + tl.maximum(lo - first, 0) // BLOCK_N * BLOCK_N
    n_full = tl.minimum(first + tl.cdiv(tl.maximum(full_lo - first, 0), BLOCK_N) * BLOCK_N, hi)
    # Not past hi: where no row sees anything there is no block at all to visit.
    n_edge = tl.maximum(tl.minimum(first + tl.maximum(full_hi - first, 0) // BLOCK_N * BLOCK_N, hi), n_full)
    # Blocks [n_begin, n_looked) are checked key by key: with a dense mask all are, and all of a sequence with holes.
    n_looked = n_begin
    n_last = hi
    if MASK != 0:
        n_looked = hi
    elif RANGE == 2:
        n_looked = n_full
        n_last = n_edge
    elif RANGE == 1:
        n_looked = tl.where(holes != 0, hi, n_begin)

    offs_dv = tl.arange(0, BLOCK_DV)
    q_head = Q + b * stride_qb + h.to(tl.int64) * stride_qh
    if EXACT:
        q = q_head + offs_m.to(tl.int64) * stride_qs  # [M]
    else:
        SIZE_D: tl.constexpr = HEAD_DIM if BLOCK_D1 == 0 else BLOCK_D
        q = load_tile(q_head, offs_m, stride_qs, tl.arange(0, BLOCK_D), row_valid, SIZE_D, BLOCK_D, True)  # [M, D]
        if KeyScale is not None:
            q = q.to(tl.float16)
    q1 = q
    if BLOCK_D1 != 0:
        offs_d1 = BLOCK_D + tl.arange(0, BLOCK_D1)
        q1 = load_tile(q_head, offs_m, stride_qs, offs_d1, row_valid, BLOCK_D1, BLOCK_D1, True).to(q.dtype)  # [M, D1]
    if KeyScale is not None:
        score_scale *= tl.load(KeyScale + b * (num_heads // group) + kv_head)
    k_head = K + b * stride_kb + kv_head * stride_kh
    v_head = V + b * stride_vb + kv_head * stride_vh
    bitmap = Range + b * stride_rb + BITMAP if RANGE == 1 else Range
    if MASK >= 3:
        bias_rows = Mask + b * stride_mb + h.to(tl.int64) * stride_mh
    elif MASK != 0:
        bias_rows = Mask + b * stride_mb + h.to(tl.int64) * stride_mh + offs_m.to(tl.int64) * stride_mq  # [M]
    else:
        bias_rows = offs_m
    drop_0 = None
    drop_1 = None
    if Philox is not None:
        drop_0, drop_1 = dropout_keys(Philox, bh, offs_m)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc1 = 0.0
    if BLOCK_DV1 != 0:
        acc1 = tl.zeros([BLOCK_M, BLOCK_DV1], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)

    # From left to right, always. The two ends have no loops of their own where that can be: the software pipeline of
    # each begins anew, which costs sequences of some hundred keys a quarter.
    if MASK != 0 or RANGE != 0:
        for n in range(n_begin, n_looked, BLOCK_N):
            acc, acc1, m, l = attend_block(
                q, q1, acc, acc1, m, l, k_head, v_head, stride_ks, stride_vs, n, lo, hi, row_lo, row_hi, bitmap, holes,
                bias_rows, row_valid, stride_mk, score_scale, cap_scale, one, True, drop_0, drop_1, first,
                drop_below, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_D1, BLOCK_DV1, BLOCK_N, EXACT,
                1, RANGE == 1, MASK, MASK == 1 or MASK == 2 or RANGE == 2,
                SOFTCAP,
            )  # fmt: skip
    if MASK == 0:
        for n in range(n_looked, n_last, BLOCK_N):
            edge = (n < n_full) | (n >= n_edge)
            acc, acc1, m, l = attend_block(
                q, q1, acc, acc1, m, l, k_head, v_head, stride_ks, stride_vs, n, lo, hi, row_lo, row_hi, bitmap, holes,
                bias_rows, row_valid, stride_mk, score_scale, cap_scale, one, edge, drop_0, drop_1, first,
                drop_below, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_D1, BLOCK_DV1, BLOCK_N, EXACT,
                0 if RANGE == 2 else 2, False, MASK, False,
                SOFTCAP,
            )  # fmt: skip
    if MASK == 0 and RANGE == 2:
        for n in range(n_edge, hi, BLOCK_N):
            acc, acc1, m, l = attend_block(
                q, q1, acc, acc1, m, l, k_head, v_head, stride_ks, stride_vs, n, lo, hi, row_lo, row_hi, bitmap, holes,
                bias_rows, row_valid, stride_mk, score_scale, cap_scale, one, True, drop_0, drop_1, first,
                drop_below, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_D1, BLOCK_DV1, BLOCK_N, EXACT,
                1, False, MASK, True,
                SOFTCAP,
            )  # fmt: skip

    weight, l, lse = finish_rows(m, l, Sinks, h + tl.zeros([BLOCK_M], tl.int32), row_valid, HAS_SINKS, EXACT)
    if Philox is not None:
        weight *= keep_scale
    if ValueScale is not None:
        weight *= tl.load(ValueScale + b * (num_heads // group) + kv_head)
    out_rows = Out + b * stride_ob + h.to(tl.int64) * stride_oh + offs_m.to(tl.int64) * stride_os
    keep = row_valid[:, None] & (offs_dv[None, :] < VALUE_DIM)
    out = normalised(acc, weight, l, EXACT).to(Out.dtype.element_ty)
    tl.store(out_rows[:, None] + offs_dv[None, :], out, mask=keep)
    if BLOCK_DV1 != 0:
        offs_dv1 = BLOCK_DV + tl.arange(0, BLOCK_DV1)
        out1 = normalised(acc1, weight, l, EXACT).to(Out.dtype.element_ty)
        tl.store(out_rows[:, None] + offs_dv1[None, :], out1, mask=row_valid[:, None])
    if HAS_LSE:
        tl.store(Lse + bh.to(tl.int64) * num_queries + offs_m, lse, mask=row_valid)


def make_launch(problem: Problem, config: ForwardConfig, inputs: Inputs, output: torch.Tensor, has_lse: bool) -> Launch:
    """The launch of `flashcore_forward` that writes output `[B, H, Q, Dv]` and, where wanted, lse `[B, H, Q]` fp32."""
    query, key, value, key_range = inputs[:4]
    range_strides = (0, 0) if key_range is None else (key_range.stride(0), key_range.stride(2))
    num_tiles = triton.cdiv(problem.num_queries, config.block_m)
    return Launch(
        kernel=flashcore_forward,
        grid=(num_tiles * problem.batch_size * problem.num_heads, 1),
        operands=(
            "query", "key", "value", "output", "lse", "key_range", "mask", "sinks", "key_scale", "value_scale",
            "philox",
        ),
        integers=(
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3], *range_strides,
            *mask_strides(inputs.mask), problem.num_heads, problem.group,
        ),
        scalars=(
            problem.num_queries, problem.num_keys, problem.query_start, problem.left, problem.right,
            drop_threshold(problem.dropout), *problem.score_factors[:2], 1.0 / (1.0 - problem.dropout), 1.0,
        ),
        constants=(
            problem.head_dim, problem.value_dim, config.block_d, config.block_dv, config.block_d1, config.block_dv1,
            config.block_m, config.block_n,
            problem.dtype == torch.float32,
            (None, "sequence", "rows").index(problem.range_layout),
            mask_number(problem.mask_kind, not problem.mask_rows), problem.has_sinks, problem.softcap > 0.0, has_lse,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip

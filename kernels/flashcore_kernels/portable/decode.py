"""Split-KV decode in one launch: few queries on many keys, cut into chunks; the last program of a head merges them."""

import torch
import triton
import triton.language as tl

from ..plan import most_chunks
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
    power_of_2,
    sequence_bounds,
)
from .choose import DecodeConfig


@triton.jit
def merge(
    Partial, stats, line, valid, rows, used, ROWS: tl.constexpr, BLOCK_DV: tl.constexpr, MAX_SPLITS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """(acc [R, DV], m [R], l [R]) of ROWS rows from the `used` chunks that wrote them, in the order of the chunks.

    All chunks' maxima are read first: with the final one at hand no sum waits for another, and the loads overlap.
    .cg: other programs wrote these; the L1 of this one may be stale.
    """
    splits = tl.arange(0, MAX_SPLITS)
    m_all = tl.load(
        stats + (line[None, :] + (splits * rows).to(tl.int64)[:, None]) * 2,
        mask=(splits < used)[:, None] & valid[None, :], other=float("-inf"), cache_modifier=".cg",
    )  # fmt: skip
    m = tl.max(m_all, axis=0)  # [R]
    m_finite = tl.where(m == float("-inf"), 0.0, m)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    offs_dv = tl.arange(0, BLOCK_DV)
    UNROLL: tl.constexpr = 16 if MAX_SPLITS > 16 else MAX_SPLITS
    for s0 in range(0, used, UNROLL):
        for i in tl.static_range(UNROLL):
            s = s0 + i + tl.zeros([ROWS], tl.int32)
            there = valid & (s < used)
            part = line + (s * rows).to(tl.int64)  # [R]
            m_s = tl.load(stats + part * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
            l_s = tl.load(stats + part * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
            acc_s = tl.load(
                Partial + part[:, None] * BLOCK_DV + offs_dv[None, :],
                mask=there[:, None], other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            weight = power_of_2(m_s - m_finite, EXACT)
            l += l_s * weight
            acc += acc_s * weight[:, None]
    return acc, m, l


@triton.jit
def write_rows(
    acc, m, l, Out, Lse, Sinks, b, kv_head, r, valid, num_kv_heads, group, num_queries, stride_ob, stride_oh, stride_os,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Normalise rows r of a KV head and store them."""
    token = r // group
    head = kv_head.to(tl.int32) * group + r % group
    weight, l, lse = finish_rows(m, l, Sinks, head, valid, HAS_SINKS, EXACT)
    out = normalised(acc, weight, l, EXACT)
    offs_v = tl.arange(0, BLOCK_DV)
    out_rows = Out + b * stride_ob + head.to(tl.int64) * stride_oh + token.to(tl.int64) * stride_os
    keep = valid[:, None] & (offs_v[None, :] < VALUE_DIM)
    tl.store(out_rows[:, None] + offs_v[None, :], out.to(Out.dtype.element_ty), mask=keep)
    if HAS_LSE:
        tl.store(Lse + (b * num_kv_heads * group + head) * num_queries + token, lse, mask=valid)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "query_start", "window_left", "window_right", "num_splits"])
def flashcore_decode(
    Q,
    K,
    V,
    Out,
    Lse,
    Range,
    Mask,
    Sinks,
    Partial,
    Count,
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
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    num_kv_heads,
    group,
    num_queries,
    num_keys,
    query_start,
    window_left,
    window_right,
    num_splits,
    score_scale,
    cap_scale,
    one,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MERGE_ROWS: tl.constexpr,  # rows that are merged at once
    EXACT: tl.constexpr,  # fp32
    MIN_CHUNK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,  # a power of two
    MAY_SPLIT: tl.constexpr,  # False: no sequence can have more than one chunk, and there is no workspace
    HAS_RANGE: tl.constexpr,
    MASK: tl.constexpr,  # 0 none, 1 bool, 2 float; 3 and 4: bool and float, one row for a KV head's queries
    HAS_SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """out = softmax(cap(scale * q k^T) + mask) v, with the rows of a KV head's whole group in one tile.

    Row r of a KV head is query token r // group of query head `kv_head * group + r % group`. A sequence's visible keys
    are cut into chunks of at least MIN_CHUNK keys and at most MAX_SPLITS chunks: a function of that sequence's own
    length alone. So is the order of the merge; which program does it is not, and does not matter.

    Shapes: as `flashcore_forward`; Partial fp32 `[B * Hkv * num_splits * rows, BLOCK_DV + 2]` (acc, m, l; the last two
    behind all of the acc), Count int32 `[B * Hkv * row_tiles]`, all 0 at the start and again at the end.
    Grid: `(num_splits * B * Hkv * row_tiles,)`; programs beyond a sequence's own number of chunks leave at once.
    """
    rows = num_queries * group
    row_tiles = tl.cdiv(rows, BLOCK_M)
    pid = tl.program_id(0)
    split = pid % num_splits
    unit = pid // num_splits
    head_unit = unit // row_tiles
    tile = unit % row_tiles
    b = (head_unit // num_kv_heads).to(tl.int64)
    kv_head = (head_unit % num_kv_heads).to(tl.int64)

    first, end, start, left, right, holes = sequence_bounds(
        Range, stride_rb, b, num_keys, query_start, window_left, window_right, HAS_RANGE
    )
    lo = tl.maximum(first, start - left)
    hi = tl.maximum(tl.minimum(end, start + num_queries + right), lo)
    # Multiples of 32 keys, so that lengths close to each other are cut alike.
    chunk = tl.maximum(tl.cdiv(tl.cdiv(hi - lo, MAX_SPLITS), 32) * 32, MIN_CHUNK)
    # One chunk at least: somebody has to write the zeros of a sequence without keys.
    used = tl.maximum(tl.cdiv(hi - lo, chunk), 1)
    if split < used:
        r = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
        row_valid = r < rows
        token = r // group
        head = kv_head.to(tl.int32) * group + r % group
        row_lo = tl.maximum(first, start + token - left)
        row_hi = tl.minimum(end, start + token + right + 1)
        q_rows = head.to(tl.int64) * stride_qh + token.to(tl.int64) * stride_qs  # [M]
        if EXACT:
            q = Q + b * stride_qb + q_rows  # [M]
        else:
            q = load_tile(Q + b * stride_qb, q_rows, 1, tl.arange(0, BLOCK_D), row_valid, HEAD_DIM, BLOCK_D, True)
        k_head = K + b * stride_kb + kv_head * stride_kh
        v_head = V + b * stride_vb + kv_head * stride_vh
        bitmap = Range + b * stride_rb + BITMAP if HAS_RANGE else Range
        if MASK >= 3:
            bias_rows = Mask + b * stride_mb + kv_head * stride_mh
        elif MASK != 0:
            bias_rows = Mask + b * stride_mb + head.to(tl.int64) * stride_mh + token.to(tl.int64) * stride_mq
        else:
            bias_rows = r
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        n_begin = lo + split * chunk
        n_end = tl.minimum(n_begin + chunk, hi)
        if HAS_RANGE and holes != 0:
            for n in range(n_begin, n_end, BLOCK_N):
                acc, acc1, m, l = attend_block(
                    q, q, acc, 0.0, m, l, k_head, v_head, stride_ks, stride_vs, n, lo, n_end, row_lo, row_hi, bitmap,
                    holes, bias_rows, row_valid, stride_mk, score_scale, cap_scale, one, True, None, None, 0, 0,
                    HEAD_DIM, VALUE_DIM,
                    BLOCK_D, BLOCK_DV, 0, 0, BLOCK_N, EXACT, 1, True, MASK, MASK == 1 or MASK == 2, SOFTCAP,
                )  # fmt: skip
        else:
            # Without the bitmap, which would cost every sequence a load a block.
            for n in range(n_begin, n_end, BLOCK_N):
                acc, acc1, m, l = attend_block(
                    q, q, acc, 0.0, m, l, k_head, v_head, stride_ks, stride_vs, n, lo, n_end, row_lo, row_hi, bitmap,
                    holes, bias_rows, row_valid, stride_mk, score_scale, cap_scale, one, True, None, None, 0, 0,
                    HEAD_DIM, VALUE_DIM,
                    BLOCK_D, BLOCK_DV, 0, 0, BLOCK_N, EXACT, 1, False, MASK, MASK == 1 or MASK == 2, SOFTCAP,
                )  # fmt: skip

        if MAY_SPLIT and used > 1:
            all_rows = (tl.num_programs(0) // row_tiles).to(tl.int64) * rows  # B * Hkv * num_splits * rows
            stats = Partial + all_rows * BLOCK_DV
            line = (head_unit.to(tl.int64) * num_splits + split) * rows + r  # [M]
            offs_dv = tl.arange(0, BLOCK_DV)
            tl.store(Partial + line[:, None] * BLOCK_DV + offs_dv[None, :], acc, mask=row_valid[:, None])
            tl.store(stats + line * 2, m, mask=row_valid)
            tl.store(stats + line * 2 + 1, l, mask=row_valid)
            # Every thread's stores must stand before the one thread that counts says that they do.
            tl.debug_barrier()
            if tl.atomic_add(Count + unit, 1, sem="acq_rel", scope="gpu") == used - 1:
                tl.store(Count + unit, 0)
                for r0 in range(tile * BLOCK_M, tl.minimum((tile + 1) * BLOCK_M, rows), MERGE_ROWS):
                    part = r0 + tl.arange(0, MERGE_ROWS)  # [R]
                    there = part < rows
                    part_acc, part_m, part_l = merge(
                        Partial, stats, head_unit.to(tl.int64) * num_splits * rows + part, there, rows, used,
                        MERGE_ROWS, BLOCK_DV, MAX_SPLITS, EXACT,
                    )  # fmt: skip
                    write_rows(
                        part_acc, part_m, part_l, Out, Lse, Sinks, b, kv_head, part, there, num_kv_heads, group,
                        num_queries, stride_ob, stride_oh, stride_os, VALUE_DIM, BLOCK_DV, HAS_SINKS, HAS_LSE, EXACT,
                    )  # fmt: skip
        else:
            write_rows(
                acc, m, l, Out, Lse, Sinks, b, kv_head, r, row_valid, num_kv_heads, group, num_queries,
                stride_ob, stride_oh, stride_os, VALUE_DIM, BLOCK_DV, HAS_SINKS, HAS_LSE, EXACT,
            )  # fmt: skip


def make_launch(problem: Problem, config: DecodeConfig, inputs: Inputs, output: torch.Tensor, has_lse: bool) -> Launch:
    """The launch of `flashcore_decode` that writes output `[B, H, Q, Dv]` and, where wanted, lse `[B, H, Q]` fp32."""
    query, key, value, key_range = inputs[:4]
    rows = problem.num_queries * problem.group
    heads = problem.batch_size * problem.num_kv_heads
    units = heads * triton.cdiv(rows, config.block_m)
    num_splits = most_chunks(problem.num_keys, config.min_chunk, config.max_chunks)
    may_split = num_splits > 1
    strides = mask_strides(inputs.mask)
    # Of a group's heads, and of its query tokens.
    shared = strides[2] == 0 and (strides[1] == 0 or problem.group == 1)
    return Launch(
        kernel=flashcore_decode,
        grid=(num_splits * units, 1),
        operands=(
            "query", "key", "value", "output", "lse", "key_range", "mask", "sinks", "partials", "counters",
        ),
        integers=(
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
            0 if key_range is None else key_range.stride(0), *strides, problem.num_kv_heads,
            problem.group,
        ),
        scalars=(
            problem.num_queries, problem.num_keys, problem.query_start, problem.left, problem.right, num_splits,
            *problem.score_factors,
        ),
        constants=(
            problem.head_dim, problem.value_dim, config.block_d, config.block_dv, config.block_m, config.block_n,
            max(min(config.block_m, 512 // config.block_dv), 1), problem.dtype == torch.float32,
            config.min_chunk, config.max_chunks, may_split, problem.range_layout is not None,
            mask_number(problem.mask_kind, shared), problem.has_sinks, problem.softcap > 0.0, has_lse,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        partials=heads * num_splits * rows * (config.block_dv + 2) if may_split else 0,
        counters=units if may_split else 0,
    )  # fmt: skip

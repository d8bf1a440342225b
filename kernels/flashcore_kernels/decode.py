"""Split-KV decode in one launch: few queries on many keys, cut into chunks; the last program of a head merges them."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .blocks import BITMAP, FAR, finish_rows, load_tile, power_of_2, sequence_bounds, short_sums, tanh
from .counters import counters
from .launch import launch, mask_argument, score_factors
from .plan import Plan, max_splits_for, padded
from .problem import Problem


@triton.jit
def load_block(
    base, n, stride, present, SIZE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, FAR_ROWS: tl.constexpr
):  # fmt: skip
    """[N, D] tile of rows n to n + N; rows that are not `present` and padding columns are 0.

    What depends on n is one scalar, so that a loop has an addition for each address and not a product.
    """
    rows = tl.arange(0, BLOCK_N)
    if FAR_ROWS:
        rows = rows.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = (base + n.to(tl.int64) * stride) + (rows[:, None] * stride + offs_d[None, :])
    if SIZE_D == BLOCK_D:
        return tl.load(ptrs, mask=present[:, None], other=0.0)
    return tl.load(ptrs, mask=present[:, None] & (offs_d < SIZE_D)[None, :], other=0.0)


@triton.jit
def attend_keys(
    q,  # [D, M]; where EXACT, [M] pointers to its rows
    acc,  # [DV, M] fp32, unnormalised output
    m,  # [M] fp32, running maximum of the scores (log2 units)
    l,  # [N, M] fp32, running denominator, not yet summed over the keys of a block
    K,
    V,  # of this sequence and KV head
    stride_ks,
    stride_vs,
    n,  # first key of the block
    lo,
    hi,  # keys [lo, hi) are the ones that some row sees
    row_lo,
    row_hi,  # [M] each row sees keys [row_lo, row_hi)
    bitmap,  # pointer to this sequence's bitmap
    bias_rows,  # [M] pointers to the rows of the dense mask
    row_valid,  # [M] which of them may be read
    stride_mk,
    score_scale,
    cap_scale,
    one,  # 1.0, but not to the compiler
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
    ONE_TOKEN: tl.constexpr,  # all rows are of one query token, which sees all of [lo, hi)
    FAR_ROWS: tl.constexpr,  # offsets within a block need 64 bits
    BITS: tl.constexpr,  # read the bitmap
    MASK: tl.constexpr,  # 0 none, 1 bool, 2 float
    SOFTCAP: tl.constexpr,
):
    """Fold keys [n, n + BLOCK_N) into the online softmax state (acc, m, l), which stands on its side.

    As `blocks.attend_block`, but with the keys as rows: k q^T and v^T p^T. A decode has few queries, and the tensor
    cores want 64 rows from four warps (wgmma) or 16 from each (mma): here those are keys, not padding.
    """
    cols = n + tl.arange(0, BLOCK_N)  # [N]
    present = (cols >= lo) & (cols < hi)  # [N]
    if BITS:
        word = tl.load(bitmap + (cols >> 5), mask=present, other=0)  # [N]
        present = present & (((word >> (cols & 31)) & 1) == 1)
    if EXACT:
        s = tl.trans(short_sums(q, K, stride_ks, cols, present, row_valid, one, HEAD_DIM, BLOCK_D, True))  # [N, M]
    else:
        k = load_block(K, n, stride_ks, present, HEAD_DIM, BLOCK_D, BLOCK_N, FAR_ROWS)  # [N, D]
        s = tl.dot(k.to(q.dtype), q)  # [N, M]
    # s * unit are the scores in units of log2; multiplied out only with the maximum at hand, by one fma.
    unit = score_scale
    if SOFTCAP:
        s = tanh(s * unit)
        unit = cap_scale
    see = present[:, None]
    if not ONE_TOKEN:
        see = see & (cols[:, None] >= row_lo[None, :]) & (cols[:, None] < row_hi[None, :])  # [N, M]
    if MASK != 0:
        at = bias_rows[None, :] + cols.to(tl.int64)[:, None] * stride_mk
        bias = tl.load(at, mask=row_valid[None, :] & present[:, None], other=0)  # [N, M]
        if MASK == 1:
            see = see & (bias != 0)
        else:
            bias = bias.to(tl.float32)
            see = see & (bias > float("-inf"))
            # finfo.min * log2(e) would overflow to -inf; finite stays finite.
            s = s * unit + tl.maximum(bias * 1.4426950408889634, -3.0e38)
            unit = 1.0
    s = tl.where(see, s, float("-inf"))
    if MASK != 0:
        # V may hold NaN where no row looks, and 0 * NaN is NaN. Rows past the last one do not count as looking.
        present = present & (tl.max((see & row_valid[None, :]).to(tl.int32), axis=1) > 0)
    v = load_block(V, n, stride_vs, present, VALUE_DIM, BLOCK_DV, BLOCK_N, FAR_ROWS)  # [N, DV]

    m_new = tl.maximum(m, tl.max(s, axis=0) * unit)  # [M]
    # A row that has seen no key yet has m = -inf, and -inf - -inf is NaN.
    m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = power_of_2(tl.fma(s, unit + tl.zeros_like(s), tl.zeros_like(s) - m_finite[None, :]), EXACT)  # [N, M]
    alpha = power_of_2(m - m_finite, EXACT)  # [M]
    l = l * alpha[None, :] + p
    if EXACT:
        pv = tl.trans(tl.dot(tl.trans(p), v.to(tl.float32), input_precision="ieee"))  # [DV, M]
        acc = tl.fma(acc, tl.broadcast_to(alpha[None, :], acc.shape), pv)
    else:
        acc = tl.dot(tl.trans(v.to(q.dtype)), p.to(q.dtype), acc * alpha[None, :])
    return acc, m_new, l


@triton.jit
def merge(
    Partial, stats, line, valid, rows, used, ROWS: tl.constexpr, BLOCK_DV: tl.constexpr, MAX_SPLITS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """(acc [R, DV], m [R], l [R]) of ROWS rows from the `used` chunks that wrote them, in the order of the chunks.

    All chunks' maxima are read first: with the final one at hand no sum waits for another, and the loads overlap.
    .cg: other programs wrote these; the L1 of this one may be stale.
    """
    every = tl.arange(0, MAX_SPLITS)
    m_all = tl.load(
        stats + (line[None, :] + (every * rows).to(tl.int64)[:, None]) * 2,
        mask=(every < used)[:, None] & valid[None, :], other=float("-inf"), cache_modifier=".cg",
    )  # fmt: skip
    m = tl.max(m_all, axis=0)  # [R]
    m_finite = tl.where(m == float("-inf"), 0.0, m)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    offs_dv = tl.arange(0, BLOCK_DV)
    TILE: tl.constexpr = 16 if MAX_SPLITS > 16 else MAX_SPLITS
    for s0 in range(0, used, TILE):
        s = s0 + tl.arange(0, TILE)  # [S]
        part = line[None, :] + (s * rows).to(tl.int64)[:, None]  # [S, R]
        there = (s < used)[:, None] & valid[None, :]
        m_s = tl.load(stats + part * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
        l_s = tl.load(stats + part * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        acc_s = tl.load(
            Partial + part[:, :, None] * BLOCK_DV + offs_dv[None, None, :],
            mask=there[:, :, None], other=0.0, cache_modifier=".cg",
        )  # [S, R, DV]  # fmt: skip
        weight = power_of_2(m_s - m_finite[None, :], EXACT)
        l += tl.sum(l_s * weight, axis=0)
        acc += tl.sum(acc_s * weight[:, :, None], axis=0)
    return acc, m, l


@triton.jit
def end_chunk(acc, m, l, Partial, stats, line, rows, row_valid, left, per_chunk, BLOCK_DV: tl.constexpr):
    """Where `left` is 0, no blocks of a chunk are left: write its state where the merge will look, and begin anew.

    `line` [M] is where; returns (acc, m, l, line, left) for the next block.
    """
    if left == 0:
        offs_dv = tl.arange(0, BLOCK_DV)
        tl.store(Partial + line[None, :] * BLOCK_DV + offs_dv[:, None], acc, mask=row_valid[None, :])
        tl.store(stats + line * 2, m, mask=row_valid)
        tl.store(stats + line * 2 + 1, tl.sum(l, axis=0), mask=row_valid)
        acc = tl.zeros_like(acc)
        m = tl.full([m.shape[0]], float("-inf"), tl.float32)
        l = tl.zeros_like(l)
        line += rows
        left = per_chunk
    return acc, m, l, line, left


@triton.jit
def write_rows(
    acc, m, l, Out, Lse, Sinks, ValueScale, b, kv_head, r, valid, num_kv_heads, group, num_queries,
    stride_ob, stride_oh, stride_os, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Normalise rows r of a KV head and store them."""
    token = r // group
    head = kv_head.to(tl.int32) * group + r % group
    out, lse = finish_rows(acc, m, l, Sinks, head, valid, HAS_SINKS, EXACT)
    if ValueScale is not None:
        out *= tl.load(ValueScale + b * num_kv_heads + kv_head)
    offs_v = tl.arange(0, BLOCK_DV)
    out_rows = Out + b * stride_ob + head.to(tl.int64) * stride_oh + token.to(tl.int64) * stride_os
    keep = valid[:, None] & (offs_v[None, :] < VALUE_DIM)
    tl.store(out_rows[:, None] + offs_v[None, :], out.to(Out.dtype.element_ty), mask=keep)
    if HAS_LSE:
        tl.store(Lse + (b * num_kv_heads * group + head) * num_queries + token, lse, mask=valid)


@triton.jit(
    do_not_specialize=[
        "num_queries",
        "num_keys",
        "query_start",
        "window_left",
        "window_right",
        "num_splits",
        "per_program",
    ]
)
def flashcore_decode(
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
    num_queries,
    num_keys,
    query_start,
    window_left,
    window_right,
    num_splits,
    programs,
    per_program,
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
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    ROW_TILES: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    FAR_ROWS: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,  # a power of two
    MAY_SPLIT: tl.constexpr,  # False: no sequence can have more than one chunk, and there is no workspace
    HAS_RANGE: tl.constexpr,
    MASK: tl.constexpr,  # 0 none, 1 bool, 2 float
    HAS_SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """out = softmax(cap(scale * q k^T) + mask) v, with the rows of a KV head's whole group in one tile.

    Row r of a KV head is query token r // group of query head `kv_head * GROUP + r % GROUP`. A sequence's visible keys
    are cut into chunks of at least MIN_BLOCKS blocks and at most MAX_SPLITS chunks: a function of that sequence's own
    length alone. So is the order of the merge. A program computes `per_program` chunks, each as if it were alone; which
    program computes a chunk, or merges them, does not matter.

    Shapes: as `flashcore_forward`; Partial fp32 `[B * Hkv * num_splits * rows, BLOCK_DV + 2]` (acc, m, l; the last two
    behind all of the acc), Count int32 `[B * Hkv * row_tiles]`, all 0 at the start and again at the end.
    Grid: `(programs * B * Hkv * row_tiles,)`, where `programs` is cdiv(num_splits, per_program); those beyond a
    sequence's own number of chunks leave at once.
    """
    rows = num_queries * GROUP
    pid = tl.program_id(0)
    split = pid % programs * per_program
    unit = pid // programs
    head_unit = unit // ROW_TILES
    tile = unit % ROW_TILES
    b = (head_unit // NUM_KV_HEADS).to(tl.int64)
    kv_head = (head_unit % NUM_KV_HEADS).to(tl.int64)

    first, end, start, left, right, holes = sequence_bounds(
        Range, stride_rb, b, num_keys, query_start, window_left, window_right, HAS_RANGE
    )
    lo = tl.maximum(first, start - left)
    hi = tl.maximum(tl.minimum(end, start + num_queries + right), lo)
    blocks = tl.cdiv(hi - lo, BLOCK_N)
    per_chunk = tl.maximum(tl.cdiv(blocks, MAX_SPLITS), MIN_BLOCKS)
    # One chunk at least: somebody has to write the zeros of a sequence without keys.
    used = tl.maximum(tl.cdiv(blocks, per_chunk), 1)
    if split < used:
        r = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
        row_valid = r < rows
        token = r // GROUP
        head = kv_head.to(tl.int32) * GROUP + r % GROUP
        row_lo = tl.maximum(first, start + token - left)
        row_hi = tl.minimum(end, start + token + right + 1)
        q_rows = head.to(tl.int64) * stride_qh + token.to(tl.int64) * stride_qs  # [M]
        if EXACT:
            q = Q + b * stride_qb + q_rows  # [M]
        else:
            q = load_tile(Q + b * stride_qb, q_rows, 1, tl.arange(0, BLOCK_D), row_valid, HEAD_DIM, BLOCK_D, True)
            if KeyScale is not None:
                q = q.to(tl.float16)  # which holds every e4m3 value
            q = tl.trans(q)  # [D, M]
        if KeyScale is not None:
            score_scale *= tl.load(KeyScale + b * NUM_KV_HEADS + kv_head)
        k_head = K + b * stride_kb + kv_head * stride_kh
        v_head = V + b * stride_vb + kv_head * stride_vh
        bitmap = Range + b * stride_rb + BITMAP if HAS_RANGE else Range
        if MASK != 0:
            bias_rows = Mask + b * stride_mb + head.to(tl.int64) * stride_mh + token.to(tl.int64) * stride_mq
        else:
            bias_rows = r
        acc = tl.zeros([BLOCK_DV, BLOCK_M], tl.float32)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        line = (head_unit.to(tl.int64) * num_splits + split) * rows + r  # [M], of the first chunk
        left = tl.where(used > 1, per_chunk, FAR)  # a lone chunk is not written there
        units = tl.num_programs(0) // programs // ROW_TILES  # B * Hkv
        stats = Partial + units.to(tl.int64) * num_splits * rows * BLOCK_DV if MAY_SPLIT else Partial
        last_block = tl.minimum((split + per_program) * per_chunk, blocks)
        if HAS_RANGE and holes != 0:
            for block in range(split * per_chunk, last_block):
                acc, m, l = attend_keys(
                    q, acc, m, l, k_head, v_head, stride_ks, stride_vs, lo + block * BLOCK_N, lo, hi, row_lo, row_hi,
                    bitmap, bias_rows, row_valid, stride_mk, score_scale, cap_scale, one, HEAD_DIM, VALUE_DIM,
                    BLOCK_D, BLOCK_DV, BLOCK_N, EXACT, ONE_TOKEN, FAR_ROWS, True, MASK, SOFTCAP,
                )  # fmt: skip
                if MAY_SPLIT:
                    left = tl.where((block == blocks - 1) & (used > 1), 0, left - 1)
                    acc, m, l, line, left = end_chunk(
                        acc, m, l, Partial, stats, line, rows, row_valid, left, per_chunk, BLOCK_DV
                    )
        else:
            # Without the bitmap, which would cost every sequence a load a block.
            for block in range(split * per_chunk, last_block):
                acc, m, l = attend_keys(
                    q, acc, m, l, k_head, v_head, stride_ks, stride_vs, lo + block * BLOCK_N, lo, hi, row_lo, row_hi,
                    bitmap, bias_rows, row_valid, stride_mk, score_scale, cap_scale, one, HEAD_DIM, VALUE_DIM,
                    BLOCK_D, BLOCK_DV, BLOCK_N, EXACT, ONE_TOKEN, FAR_ROWS, False, MASK, SOFTCAP,
                )  # fmt: skip
                if MAY_SPLIT:
                    left = tl.where((block == blocks - 1) & (used > 1), 0, left - 1)
                    acc, m, l, line, left = end_chunk(
                        acc, m, l, Partial, stats, line, rows, row_valid, left, per_chunk, BLOCK_DV
                    )

        if MAY_SPLIT and used > 1:
            # Every thread's stores must stand before the one thread that counts says that they do.
            tl.debug_barrier()
            if tl.atomic_add(Count + unit, 1, sem="acq_rel", scope="gpu") == tl.cdiv(used, per_program) - 1:
                tl.store(Count + unit, 0)
                for r0 in range(tile * BLOCK_M, tl.minimum((tile + 1) * BLOCK_M, rows), MERGE_ROWS):
                    part = r0 + tl.arange(0, MERGE_ROWS)  # [R]
                    there = part < rows
                    part_acc, part_m, part_l = merge(
                        Partial, stats, head_unit.to(tl.int64) * num_splits * rows + part, there, rows, used,
                        MERGE_ROWS, BLOCK_DV, MAX_SPLITS, EXACT,
                    )  # fmt: skip
                    write_rows(
                        part_acc, part_m, part_l, Out, Lse, Sinks, ValueScale, b, kv_head, part, there, NUM_KV_HEADS,
                        GROUP, num_queries, stride_ob, stride_oh, stride_os, VALUE_DIM, BLOCK_DV, HAS_SINKS, HAS_LSE,
                        EXACT,
                    )  # fmt: skip
        else:
            write_rows(
                tl.trans(acc), m, tl.sum(l, axis=0), Out, Lse, Sinks, ValueScale, b, kv_head, r, row_valid,
                NUM_KV_HEADS, GROUP, num_queries, stride_ob, stride_oh, stride_os, VALUE_DIM, BLOCK_DV, HAS_SINKS,
                HAS_LSE, EXACT,
            )  # fmt: skip


class DecodeLaunch(NamedTuple):
    """Everything about a launch of `flashcore_decode` but the tensors.

    Attributes:
        kernel: the jitted function.
        programs: size of the grid.
        units: how many counters the merge needs.
        partial: fp32 elements of the workspace, 0 where no sequence can have two chunks.
        integers, scalars, constants: the parameters behind the pointers, see `launch`.
    """

    kernel: object
    programs: int
    units: int
    partial: int
    integers: tuple
    scalars: tuple
    constants: tuple


def decode_launch(
    problem: Problem,
    plan: Plan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    key_range: torch.Tensor | None,
    mask_strides: tuple[int, ...],
    has_lse: bool,
) -> DecodeLaunch:
    """Grid, workspace and parameters for tensors with these strides."""
    rows = problem.num_queries * problem.group
    row_tiles = triton.cdiv(rows, plan.block_m)
    units = problem.batch_size * problem.num_kv_heads * row_tiles
    num_splits = max_splits_for(problem.num_keys, plan)
    # Chunks are for one long sequence to fill the GPU; a batch that fills it does several in a program.
    per_program = min(padded(max(units * num_splits // plan.programs, 1)), padded(num_splits))
    programs = triton.cdiv(num_splits, per_program)
    lines = problem.batch_size * problem.num_kv_heads * num_splits * rows
    return DecodeLaunch(
        flashcore_decode,
        programs * units,
        units,
        lines * (plan.block_dv + 2) if num_splits > 1 else 0,
        (
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
            0 if key_range is None else key_range.stride(0), *mask_strides,
        ),
        (
            problem.num_queries, problem.num_keys, problem.query_start, problem.left, problem.right, num_splits,
            programs, per_program, *score_factors(problem),
        ),
        (
            problem.head_dim, problem.value_dim, plan.block_d, plan.block_dv, plan.block_m, plan.block_n,
            max(min(plan.block_m, 512 // plan.block_dv), 1), problem.dtype == torch.float32,
            problem.num_kv_heads, problem.group, row_tiles, problem.num_queries == 1,
            max(key.stride(2), value.stride(2)) * plan.block_n >= 1 << 31, plan.min_blocks,
            plan.max_splits, num_splits > 1, problem.range_layout is not None,
            (None, "bool", "float").index(problem.mask_kind), problem.has_sinks, problem.softcap > 0.0, has_lse,
        ),
    )  # fmt: skip


def run_decode(
    problem: Problem,
    plan: Plan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_range: torch.Tensor | None,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> None:
    """Launch `flashcore_decode`: write `out` `[B, H, Q, Dv]` and, where given, `lse` `[B, H, Q]` fp32."""
    mask, mask_strides = mask_argument(problem, mask)
    setup = decode_launch(problem, plan, query, key, value, out, key_range, mask_strides, lse is not None)
    partial = count = None
    if setup.partial:
        partial = torch.empty(setup.partial, dtype=torch.float32, device=query.device)
        count = counters.get(setup.units, query.device)
    pointers = (query, key, value, out, lse, key_range, mask, sinks, key_scale, value_scale, partial, count)
    try:
        launch(setup.kernel, setup.programs, pointers + setup.integers, setup.scalars, setup.constants, plan)
    except BaseException:
        counters.forget(query.device)
        raise

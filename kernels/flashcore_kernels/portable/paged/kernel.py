"""Attention on pages, prompts and single tokens in one launch: the kernel."""

import triton
import triton.language as tl

from ..blocks import FAR, attend_block, finish_rows, load_tile, normalised
from ..decode import merge
from .pages import attend_pages


@triton.jit
def sequence_of(tile, CuQ, num_sequences, group, BLOCK_M: tl.constexpr):
    """(sequence, its first tile) of a prompt's tile. A sequence may have tiles to spare; the last one is the padding.

    Sequence s begins at tile cu_q[s] * group // BLOCK_M + s, which leaves each enough of them: no list of tiles has to
    be made, and no length known to the host.
    """
    low = 0
    high = num_sequences
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(CuQ + middle) * group // BLOCK_M + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low, tl.load(CuQ + low) * group // BLOCK_M + low


@triton.jit
def keys_of(Lengths, s, CUMULATIVE: tl.constexpr):
    """How many keys sequence s has, its new ones among them."""
    if CUMULATIVE:
        return tl.load(Lengths + s + 1) - tl.load(Lengths + s)
    return tl.load(Lengths + s)


@triton.jit
def write_tokens(
    acc, m, l, Out, Lse, Sinks, ValueScale, kv_head, first_token, r, valid, group, num_tokens, stride_ot, stride_oh,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Normalise rows r of a sequence's KV head and store them."""
    token = first_token + r // group
    head = kv_head.to(tl.int32) * group + r % group
    weight, l, lse = finish_rows(m, l, Sinks, head, valid, HAS_SINKS, EXACT)
    if ValueScale is not None:
        weight *= tl.load(ValueScale + kv_head)
    out = normalised(acc, weight, l, EXACT)
    offs_v = tl.arange(0, BLOCK_DV)
    out_rows = Out + token.to(tl.int64) * stride_ot + head.to(tl.int64) * stride_oh
    keep = valid[:, None] & (offs_v[None, :] < VALUE_DIM)
    tl.store(out_rows[:, None] + offs_v[None, :], out.to(Out.dtype.element_ty), mask=keep)
    if HAS_LSE:
        tl.store(Lse + head.to(tl.int64) * num_tokens + token, lse, mask=valid)


@triton.jit(
    do_not_specialize=[
        "num_tokens", "num_sequences", "table_width", "num_pages", "window_left", "window_right", "num_splits",
        "shares", "decode_programs",
    ]
)  # fmt: skip
def flashcore_paged(
    Q,
    K,
    V,
    Out,
    Lse,
    NewK,
    NewV,
    Table,
    CuQ,
    Lengths,
    Sinks,
    KeyScale,
    ValueScale,
    Partial,
    Count,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_ks,
    stride_kh,
    stride_vp,
    stride_vs,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_nkt,
    stride_nkh,
    stride_nvt,
    stride_nvh,
    stride_table,
    num_kv_heads,
    group,
    num_tokens,
    num_sequences,
    table_width,
    num_pages,
    window_left,
    window_right,
    num_splits,
    shares,
    decode_programs,
    score_scale,
    cap_scale,
    one,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows and keys of a prompt's blocks
    BLOCK_N: tl.constexpr,
    DECODE_M: tl.constexpr,  # rows and keys of a single token's
    DECODE_N: tl.constexpr,
    DECODE_STAGES: tl.constexpr,
    NEW_STAGES: tl.constexpr,  # of a loop without a look at the table
    MERGE_ROWS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    CHUNK_UNIT: tl.constexpr,  # chunks begin and end at multiples of so many keys; 0: at the first key that is seen
    MAY_SPLIT: tl.constexpr,
    PROMPTS: tl.constexpr,  # there are programs for sequences of several queries and for padding
    PADDING: tl.constexpr,  # no sequence has more than one query, and those without any write the padding
    PAGE_SIZE: tl.constexpr,
    RING: tl.constexpr,
    WHOLE: tl.constexpr,  # of a prompt's blocks; see attend_pages
    DECODE_WHOLE: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    EXACT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """out = softmax(cap(scale * q k^T) + mask) v, for the queries of many sequences, whose keys lie in pages.

    Shapes: Q `[T, H, D]`, of which sequence s has [CuQ[s], CuQ[s + 1]) as the last of its Lengths[s] keys; what is
    left of T is padding. K `[pages, page_size, Hkv, D]`, V and Out with DV, Lse `[H, T]` fp32, Table `[S, most pages of
    a sequence]` int32, NewK and NewV `[T, Hkv, D]` or None: the keys of the queries themselves, which are not in their
    pages yet. KeyScale and ValueScale fp32 `[Hkv]`, for pools in e4m3. CuQ int32 `[S + 1]`, Lengths int32 `[S]`, or as
    sums `[S + 1]` (CUMULATIVE). Rows without a key are 0, and so are those of the padding.

    A sequence with one query is served as `flashcore_decode` does it: its visible keys are cut into chunks by its own
    length alone, and a KV head's whole group is one tile. `shares` programs take its chunks in turns; the one that is
    done last merges them, in their order. Sequences with more queries are cut into tiles of BLOCK_M rows (query
    tokens x group), and their keys are read from left to right, as `flashcore_forward` does it. So a sequence's bits
    depend on nothing but itself.

    Grid: `decode_programs` = S * Hkv * cdiv(group, DECODE_M) * shares programs, and behind them, with PROMPTS,
    (T * group // BLOCK_M + S + 1) * Hkv, the last tiles first.
    """
    pid = tl.program_id(0)
    left = tl.where(window_left < 0, FAR, tl.minimum(window_left, FAR))
    right = tl.where(window_right < 0, FAR, tl.minimum(window_right, FAR))
    if pid < decode_programs:
        row_tiles = tl.cdiv(group, DECODE_M)
        share = pid % shares
        unit = pid // shares
        tile = unit % row_tiles
        head_unit = unit // row_tiles
        kv_head = (head_unit % num_kv_heads).to(tl.int64)
        s = head_unit // num_kv_heads
        first_token = tl.load(CuQ + s)
        num_queries = tl.load(CuQ + s + 1) - first_token
        r = tile * DECODE_M + tl.arange(0, DECODE_M)  # [M], the group's heads
        row_valid = r < group
        if num_queries == 1:
            length = keys_of(Lengths, s, CUMULATIVE)
            start = length - 1
            first = 0
            if RING > 0:
                first = tl.maximum(length - RING, 0)
            lo = tl.maximum(first, start - left)
            hi = tl.maximum(tl.minimum(length, start + right + 1), lo)
            begin = lo
            if CHUNK_UNIT > 0:
                begin = lo // CHUNK_UNIT * CHUNK_UNIT
            UNIT: tl.constexpr = 32 if CHUNK_UNIT == 0 else CHUNK_UNIT
            chunk = tl.maximum(tl.cdiv(tl.cdiv(hi - begin, MAX_SPLITS), UNIT) * UNIT, MIN_CHUNK)
            # One chunk at least: somebody has to write the zeros of a sequence without keys.
            used = tl.minimum(tl.maximum(tl.cdiv(hi - begin, chunk), 1), num_splits)
            if share < used:
                row_lo = lo + r * 0
                row_hi = hi + r * 0
                q_rows = (kv_head.to(tl.int32) * group + r).to(tl.int64) * stride_qh  # [M]
                q_base = Q + first_token.to(tl.int64) * stride_qt
                if EXACT:
                    q = q_base + q_rows
                else:
                    q = load_tile(q_base, q_rows, 1, tl.arange(0, BLOCK_D), row_valid, HEAD_DIM, BLOCK_D, True)
                    if KeyScale is not None:
                        q = q.to(tl.float16)
                if KeyScale is not None:
                    score_scale *= tl.load(KeyScale + kv_head)
                k_head = K + kv_head * stride_kh
                v_head = V + kv_head * stride_vh
                table = Table + s.to(tl.int64) * stride_table
                new_k = K
                new_v = V
                if NewK is not None:
                    new_k = NewK + first_token.to(tl.int64) * stride_nkt + kv_head * stride_nkh
                    new_v = NewV + first_token.to(tl.int64) * stride_nvt + kv_head * stride_nvh
                acc = tl.zeros([DECODE_M, BLOCK_DV], tl.float32)
                m = tl.full([DECODE_M], float("-inf"), tl.float32)
                l = tl.zeros([DECODE_M], tl.float32)
                # One loop over the blocks of all its chunks, so that copies run ahead across their ends.
                blocks = tl.cdiv(chunk, DECODE_N)
                for i in tl.range(0, tl.cdiv(used - share, shares) * blocks, num_stages=DECODE_STAGES):
                    # From i alone: what the branch below changes is not known to the copies that run ahead.
                    split = share + i // blocks * shares
                    block = i % blocks
                    n = begin + split * chunk + block * DECODE_N
                    n_end = tl.minimum(begin + (split + 1) * chunk, hi)
                    acc, m, l = attend_pages(
                        q, acc, m, l, k_head, v_head, new_k, new_v, table, table_width, num_pages, length - 1,
                        stride_kp, stride_ks, stride_vp, stride_vs, stride_nkt, stride_nvt, n, lo, n_end, row_lo,
                        row_hi, row_valid, score_scale, cap_scale, one, True, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
                        DECODE_N, PAGE_SIZE, RING, DECODE_WHOLE, NewK is not None, EXACT, 1, SOFTCAP,
                    )  # fmt: skip
                    if MAY_SPLIT:
                        if (block == blocks - 1) & (used > 1):
                            # Behind all of the acc: the maxima and the sums of all rows.
                            all_rows = num_sequences.to(tl.int64) * num_kv_heads * num_splits * group
                            stats = Partial + all_rows * BLOCK_DV
                            line = (head_unit.to(tl.int64) * num_splits + split) * group + r  # [M]
                            rows = Partial + line[:, None] * BLOCK_DV
                            tl.store(rows + tl.arange(0, BLOCK_DV)[None, :], acc, mask=row_valid[:, None])
                            tl.store(stats + line * 2, m, mask=row_valid)
                            tl.store(stats + line * 2 + 1, l, mask=row_valid)
                            acc = tl.zeros([DECODE_M, BLOCK_DV], tl.float32)
                            m = tl.full([DECODE_M], float("-inf"), tl.float32)
                            l = tl.zeros([DECODE_M], tl.float32)
                if (not MAY_SPLIT) or used == 1:
                    write_tokens(
                        acc, m, l, Out, Lse, Sinks, ValueScale, kv_head, first_token, r, row_valid, group, num_tokens,
                        stride_ot, stride_oh, VALUE_DIM, BLOCK_DV, HAS_SINKS, HAS_LSE, EXACT,
                    )  # fmt: skip
                if MAY_SPLIT and used > 1:
                    stats = Partial + num_sequences.to(tl.int64) * num_kv_heads * num_splits * group * BLOCK_DV
                    # Every thread's stores must stand before the one thread that counts says that they do.
                    tl.debug_barrier()
                    sharing = tl.minimum(used, shares)
                    if tl.atomic_add(Count + unit, 1, sem="acq_rel", scope="gpu") == sharing - 1:
                        tl.store(Count + unit, 0)
                        for r0 in range(tile * DECODE_M, tl.minimum((tile + 1) * DECODE_M, group), MERGE_ROWS):
                            part = r0 + tl.arange(0, MERGE_ROWS)  # [R]
                            there = part < group
                            part_acc, part_m, part_l = merge(
                                Partial, stats, head_unit.to(tl.int64) * num_splits * group + part, there, group, used,
                                MERGE_ROWS, BLOCK_DV, MAX_SPLITS, EXACT,
                            )  # fmt: skip
                            write_tokens(
                                part_acc, part_m, part_l, Out, Lse, Sinks, ValueScale, kv_head, first_token, part,
                                there, group, num_tokens, stride_ot, stride_oh, VALUE_DIM, BLOCK_DV, HAS_SINKS,
                                HAS_LSE, EXACT,
                            )  # fmt: skip
        elif PADDING and (num_queries == 0) and (share == 0):
            # The k-th sequence without a query takes the k-th token of the padding.
            token = tl.load(CuQ + num_sequences) + s - first_token
            nothing = tl.zeros([DECODE_M], tl.float32)
            write_tokens(
                tl.zeros([DECODE_M, BLOCK_DV], tl.float32), nothing + float("-inf"), nothing, Out, Lse, Sinks,
                ValueScale, kv_head, token, r, row_valid & (token + r * 0 < num_tokens), group, num_tokens, stride_ot,
                stride_oh, VALUE_DIM, BLOCK_DV, HAS_SINKS, HAS_LSE, EXACT,
            )  # fmt: skip
    elif PROMPTS:
        tiles = num_tokens * group // BLOCK_M + num_sequences + 1
        at = pid - decode_programs
        kv_head = (at % num_kv_heads).to(tl.int64)
        tile = tiles - 1 - at // num_kv_heads
        s, first_tile = sequence_of(tile, CuQ, num_sequences, group, BLOCK_M)
        first_token = tl.load(CuQ + s)
        padding = s == num_sequences
        num_queries = tl.load(CuQ + s + 1, mask=s < num_sequences, other=0) - first_token
        num_queries = tl.where(padding, num_tokens - first_token, num_queries)
        top_row = (tile - first_tile) * BLOCK_M
        if (top_row < num_queries * group) & ((num_queries != 1) | padding):
            length = 0
            if s < num_sequences:
                length = keys_of(Lengths, s, CUMULATIVE)
            start = length - num_queries
            first = 0
            if RING > 0:
                first = tl.maximum((start if NewK is not None else length) - RING, 0)
            r = top_row + tl.arange(0, BLOCK_M)  # [M]
            row_valid = r < num_queries * group
            token = r // group
            row_lo = tl.maximum(first, start + token - left)
            row_hi = tl.minimum(length, start + token + right + 1)
            # Neither end of a row's keys moves back from row to row, so the first and the last row say what all of
            # them see, [full_lo, full_hi), and what some of them see, [lo, hi).
            top = top_row // group
            bottom = tl.minimum((top_row + BLOCK_M - 1) // group, num_queries - 1)
            full_lo = tl.maximum(first, start + bottom - left)
            full_hi = tl.minimum(length, start + top + right + 1)
            top = tl.maximum(top, first - start - right)
            bottom = tl.minimum(bottom, length - 1 - start + left)
            some = (top <= bottom) & (first < length)
            lo = tl.where(some, tl.maximum(first, start + top - left), 0)
            hi = tl.where(some, tl.minimum(length, start + bottom + right + 1), 0)
            # Blocks lie on a grid that starts at the sequence's first key.
            n_begin = lo // BLOCK_N * BLOCK_N
            n_full = tl.cdiv(tl.maximum(full_lo, 0), BLOCK_N) * BLOCK_N
            n_edge = tl.maximum(full_hi, 0) // BLOCK_N * BLOCK_N

            head = kv_head.to(tl.int32) * group + r % group
            q_rows = head.to(tl.int64) * stride_qh + token.to(tl.int64) * stride_qt  # [M]
            q_base = Q + first_token.to(tl.int64) * stride_qt
            if EXACT:
                q = q_base + q_rows
            else:
                q = load_tile(q_base, q_rows, 1, tl.arange(0, BLOCK_D), row_valid, HEAD_DIM, BLOCK_D, True)  # [M, D]
                if KeyScale is not None:
                    q = q.to(tl.float16)
            if KeyScale is not None:
                score_scale *= tl.load(KeyScale + kv_head)
            k_head = K + kv_head * stride_kh
            v_head = V + kv_head * stride_vh
            table = Table + s.to(tl.int64) * stride_table
            new_k = K
            new_v = V
            if NewK is not None:
                new_k = NewK + first_token.to(tl.int64) * stride_nkt + kv_head * stride_nkh
                new_v = NewV + first_token.to(tl.int64) * stride_nvt + kv_head * stride_nvh
            acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            l = tl.zeros([BLOCK_M], tl.float32)
            # From there on a block's keys are all new, and need no look at the table.
            n_new = hi
            if NewK is not None:
                n_new = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(start, 0), BLOCK_N) * BLOCK_N, n_begin), hi)
            for n in range(n_begin, n_new, BLOCK_N):
                edge = (n < n_full) | (n >= n_edge)
                acc, m, l = attend_pages(
                    q, acc, m, l, k_head, v_head, new_k, new_v, table, table_width, num_pages, start, stride_kp,
                    stride_ks, stride_vp, stride_vs, stride_nkt, stride_nvt, n, lo, hi, row_lo, row_hi, row_valid,
                    score_scale, cap_scale, one, edge, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, PAGE_SIZE,
                    RING, WHOLE, NewK is not None, EXACT, 2, SOFTCAP,
                )  # fmt: skip
            if NewK is not None:
                new_k -= start.to(tl.int64) * stride_nkt
                new_v -= start.to(tl.int64) * stride_nvt
                for n in tl.range(n_new, hi, BLOCK_N, num_stages=NEW_STAGES):
                    edge = (n < n_full) | (n >= n_edge)
                    acc, acc1, m, l = attend_block(
                        q, q, acc, 0.0, m, l, new_k, new_v, stride_nkt, stride_nvt, n, lo, hi, row_lo, row_hi, table,
                        0, row_lo, row_valid, 0, score_scale, cap_scale, one, edge, None, None, 0, 0,
                        HEAD_DIM, VALUE_DIM, BLOCK_D,
                        BLOCK_DV, 0, 0, BLOCK_N, EXACT, 2, False, 0, False, SOFTCAP,
                    )  # fmt: skip
            write_tokens(
                acc, m, l, Out, Lse, Sinks, ValueScale, kv_head, first_token, r, row_valid, group, num_tokens,
                stride_ot, stride_oh, VALUE_DIM, BLOCK_DV, HAS_SINKS, HAS_LSE, EXACT,
            )  # fmt: skip

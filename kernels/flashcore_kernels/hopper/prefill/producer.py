"""The producer warp: it brings Q, K and V to shared memory, and keeps what nobody sees out of V."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..triton_api import barrier, tma_load
from ..visible import BITMAP, FAR, may_have_gaps, sequence_bounds, tile_blocks, tile_keys
from .schedule import place_of, taken_over

# With how many blocks left to fetch a program asks for its next tile.
ASK_BLOCKS = gl.constexpr(4)


@gluon.jit
def _seen_columns(Range, keep_smem, b, m0, n, lo, hi, holes, numbers, BM: gl.constexpr, BN: gl.constexpr,
                  RANGE: gl.constexpr):  # fmt: skip
    """Write to `keep_smem` int32 `[BN]` which keys of the block exist and are seen by a row of the tile."""
    num_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rs = numbers
    cols = n + gl.arange(0, BN, gl.BlockedLayout([1], [32], [1], [0]))
    inside = (cols >= lo) & (cols < hi)
    if RANGE == 1:
        bitmap = Range + b.to(gl.int64) * stride_rb + BITMAP
        word = gl.load(bitmap + (cols >> 5), mask=inside, other=0)
        keep = (word >> (cols & 31)) & 1
    else:
        keep = gl.zeros_like(cols)
        for row in range(m0, gl.minimum(m0 + BM, num_queries)):
            line = Range + b.to(gl.int64) * stride_rb + row.to(gl.int64) * stride_rs
            row_lo = gl.load(line)
            row_hi = gl.load(line + 1)
            keep = keep | ((cols >= row_lo) & (cols < row_hi)).to(gl.int32)
    keep_smem.store(gl.where(inside, keep, 0))


@gluon.jit
def _scrub(tile, keep_smem, n, lo, hi, any_key, BN: gl.constexpr, DV: gl.constexpr):
    """Zero the rows of V `[BN, DV]` that nobody sees: they may hold NaN, and 0 * NaN is NaN."""
    # Pieces of 8 rows of 128 bytes, the unit of the swizzle, and what a warp's few registers hold.
    WIDE: gl.constexpr = 64 if DV >= 64 else DV
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDE, WIDE // 8], [1, 1], [1, 0])
    for c in gl.static_range(0, BN, 8):
        if any_key | (n + c < lo) | (n + c + 8 > hi):
            slots = n + c + gl.arange(0, 8, gl.SliceLayout(1, LAYOUT))
            keep = (slots >= lo) & (slots < hi)
            if any_key:
                keep = keep & (keep_smem.slice(c, 8).load(gl.SliceLayout(1, LAYOUT)) != 0)
            for d in gl.static_range(0, DV, WIDE):
                part = tile.slice(c, 8).slice(d, WIDE, dim=1)
                rows = part.load(LAYOUT)
                part.store(gl.where(keep[:, None], rows, gl.zeros_like(rows)))


@gluon.jit
def _load_queries(descs, smem, bars, b, h, m0, turn, C: gl.constexpr):
    """Copy a tile's queries, each partition's to a slot of its own."""
    SLOTS: gl.constexpr = C.query_slots
    ROWS: gl.constexpr = C.rows
    PARTITIONS: gl.constexpr = 64 * C.consumers // ROWS
    D0: gl.constexpr = C.d0
    D1: gl.constexpr = C.d1
    q0_desc, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, o0_desc, o1_desc = descs
    q0_smem, q1_smem, k0_smem, k1_smem, v0_smem, v1_smem, keep_smem, o_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw = bars
    for c in gl.static_range(PARTITIONS):
        slot = c * SLOTS + turn % SLOTS
        mbarrier.wait(q_empty.index(slot), (turn // SLOTS & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), ROWS * (D0 + D1) * 2)
        tma_load(q0_desc, [b, h, m0 + c * ROWS, 0], q_full.index(slot), q0_smem.index(slot))
        if D1 > 0:
            tma_load(q1_desc, [b, h, m0 + c * ROWS, D0], q_full.index(slot), q1_smem.index(slot))


@gluon.jit
def produce(descs, smem, bars, queue, pointers, numbers, scales, C: gl.constexpr):
    """The producer warp: copies Q once a tile, K and V block by block, ahead of the consumers."""
    D0: gl.constexpr = C.d0
    D1: gl.constexpr = C.d1
    DV0: gl.constexpr = C.dv0
    DV1: gl.constexpr = C.dv1
    BN: gl.constexpr = C.block_n
    STAGES: gl.constexpr = C.stages
    SLOTS: gl.constexpr = C.query_slots
    RANGE: gl.constexpr = C.range_layout
    CONSUMERS: gl.constexpr = C.consumers
    q0_desc, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, o0_desc, o1_desc = descs
    q0_smem, q1_smem, k0_smem, k1_smem, v0_smem, v1_smem, keep_smem, o_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw = bars
    Lse, Range, Sinks = pointers
    num_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rs = numbers
    place_smem, place_full, place_asked, Counter = queue
    # One slot for queries is free only when the tile before needs them no more. (With key ranges the consumers of
    # head_dim 192 would have no registers left.)
    KEYS_FIRST: gl.constexpr = SLOTS == 1 and RANGE == 0
    BM: gl.constexpr = 64 * CONSUMERS
    b, h, tile = place_of(gl.program_id(0), num_heads, scales)
    turn = 0
    use = 0
    scrubs = 0
    while tile >= 0:
        kv_head = h // group
        m0 = tile * BM
        sequence = sequence_bounds(Range, b, numbers, RANGE)
        first, end, start, left, right, holes = sequence
        lo, hi = tile_keys(Range, b, m0, sequence, numbers, BM, RANGE, 1)
        begin, count = tile_blocks(first, lo, hi, num_keys, BN)
        # Values at slots outside of [clean_lo, clean_hi) may be NaN.
        if RANGE == 2:
            clean_lo = lo
            clean_hi = hi
            any_key = may_have_gaps(Range, b, m0, numbers, BM)
        else:
            clean_lo = gl.maximum(first, start - left)
            clean_hi = gl.minimum(end, start + num_queries + right)
            any_key = holes != 0
        # The copy engine itself gives zeros behind the last key.
        dirty_from = gl.where(clean_hi < num_keys, clean_hi, FAR)

        # Late, or a program that takes a long tile shortly before the end would end late. But consumers wait for the
        # next place before they release their last block: early, where one may have far fewer blocks than another.
        ask_at = count * 0
        if RANGE < 2:
            ask_at = gl.where(m0 + BM <= num_queries, gl.maximum(count - ASK_BLOCKS, 0), 0)
        if not KEYS_FIRST:
            _load_queries(descs, smem, bars, b, h, m0, turn, C)
        for j in range(count):
            n = begin + j * BN
            stage = use % STAGES
            phase = use // STAGES & 1
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), BN * (D0 + D1) * 2)
            tma_load(k0_desc, [b, kv_head, n, 0], k_full.index(stage), k0_smem.index(stage))
            if D1 > 0:
                tma_load(k1_desc, [b, kv_head, n, D0], k_full.index(stage), k1_smem.index(stage))
            if KEYS_FIRST:
                if j == 0:
                    _load_queries(descs, smem, bars, b, h, m0, turn, C)
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            if any_key | (n < clean_lo) | (n + BN > dirty_from):
                mbarrier.expect(v_raw, BN * (DV0 + DV1) * 2)
                tma_load(v0_desc, [b, kv_head, n, 0], v_raw, v0_smem.index(stage))
                if DV1 > 0:
                    tma_load(v1_desc, [b, kv_head, n, DV0], v_raw, v1_smem.index(stage))
                if RANGE > 0:
                    if any_key:
                        _seen_columns(Range, keep_smem, b, m0, n, clean_lo, clean_hi, holes, numbers, BM, BN, RANGE)
                mbarrier.wait(v_raw, scrubs & 1)
                scrubs += 1
                _scrub(v0_smem.index(stage).reshape([BN, DV0]), keep_smem, n, clean_lo, clean_hi, any_key, BN, DV0)
                if DV1 > 0:
                    _scrub(v1_smem.index(stage).reshape([BN, DV1]), keep_smem, n, clean_lo, clean_hi, any_key, BN, DV1)
                fence_async_shared()
                barrier()
                mbarrier.arrive(v_full.index(stage), count=1)
            else:
                mbarrier.expect(v_full.index(stage), BN * (DV0 + DV1) * 2)
                tma_load(v0_desc, [b, kv_head, n, 0], v_full.index(stage), v0_smem.index(stage))
                if DV1 > 0:
                    tma_load(v1_desc, [b, kv_head, n, DV0], v_full.index(stage), v1_smem.index(stage))
            use += 1
            if j == ask_at:
                mbarrier.arrive(place_asked, count=1)
        b, h, tile = taken_over(queue, turn, 1)
        turn += 1

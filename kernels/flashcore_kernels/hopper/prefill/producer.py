"""The producer warp: it brings Q, K and V to shared memory, and keeps what nobody sees out of V."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..copies import scrub, write_seen_keys
from ..schedule import next_position, position_of
from ..triton_api import barrier, tma_load
from ..visible import FAR, may_have_gaps, sequence_bounds, tile_blocks, tile_keys
from .masks import (
    BIAS,
    FLAGS,
    GAPS,
    HIDES,
    NO_MASK,
    block_list,
    limits_rows,
    listed_blocks,
    load_mask_tiles,
    write_left_keys,
)

# With how many blocks left to fetch a program asks for its next tile.
ASK_BLOCKS = gl.constexpr(4)


@gluon.jit
def _load_queries(descriptors, buffers, barriers, b, h, m0, tiles_done, C: gl.constexpr):
    """Copy a tile's queries, each partition's to a buffer of its own."""
    QUERY_BUFFERS: gl.constexpr = C.query_buffers
    ROWS: gl.constexpr = C.rows
    PARTITIONS: gl.constexpr = 64 * C.consumers // ROWS
    D0: gl.constexpr = C.d0
    D1: gl.constexpr = C.d1
    for c in gl.static_range(PARTITIONS):
        buffer = c * QUERY_BUFFERS + tiles_done % QUERY_BUFFERS
        mbarrier.wait(barriers.q_empty.index(buffer), (tiles_done // QUERY_BUFFERS & 1) ^ 1)
        q_full = barriers.q_full.index(buffer)
        mbarrier.expect(q_full, ROWS * (D0 + D1) * 2)
        tma_load(descriptors.q0, [b, h, m0 + c * ROWS, 0], q_full, buffers.q0.index(buffer))
        if D1 > 0:
            tma_load(descriptors.q1, [b, h, m0 + c * ROWS, D0], q_full, buffers.q1.index(buffer))


@gluon.jit
def produce(call, C: gl.constexpr):
    """The producer warp: copies Q once a tile, K and V block by block, ahead of the consumers."""
    D0: gl.constexpr = C.d0
    D1: gl.constexpr = C.d1
    DV0: gl.constexpr = C.dv0
    DV1: gl.constexpr = C.dv1
    BN: gl.constexpr = C.block_n
    STAGES: gl.constexpr = C.stages
    RANGE: gl.constexpr = C.range_layout
    CONSUMERS: gl.constexpr = C.consumers
    # A single query buffer is free only when the tile before needs its queries no more. Until then keys can be copied.
    # (With key ranges the consumers of head_dim 192 would have no registers left.)
    KEYS_FIRST: gl.constexpr = C.query_buffers == 1 and RANGE == 0
    BM: gl.constexpr = 64 * CONSUMERS
    descriptors = call.descriptors
    buffers = call.buffers
    barriers = call.barriers
    visibility = call.visibility
    Range = call.pointers.key_range
    b, h, tile = position_of(gl.program_id(0), call.heads.num_heads, call.order)
    tiles_done = 0
    use = 0
    scrubs = 0
    while tile >= 0:
        kv_head = h // call.heads.group
        m0 = tile * BM
        bounds = sequence_bounds(Range, b, visibility, RANGE)
        lo, hi = tile_keys(Range, b, m0, bounds, visibility, BM, RANGE, 1)
        begin, count = tile_blocks(bounds.first if C.mask == NO_MASK else 0, lo, hi, visibility.num_keys, BN)
        if C.mask != NO_MASK:
            begin, count = listed_blocks(call.mask, b, h, tile, begin, count, BN)
            entries = block_list(call.mask, b, h, tile) + begin
            next_entry = gl.load(entries)
        # Values of keys outside of [clean_lo, clean_hi) may be NaN. Where `any_key` holds, so may any key's. With a
        # mask this is the tile's own range: the mask may hide a key from just those tiles that the range leaves it to.
        if RANGE == 2 or C.mask != NO_MASK:
            clean_lo = lo
            clean_hi = hi
        else:
            clean_lo = gl.maximum(bounds.first, bounds.start - bounds.left)
            clean_hi = gl.minimum(bounds.end, bounds.start + visibility.num_queries + bounds.right)
        if RANGE == 2:
            any_key = may_have_gaps(Range, b, m0, visibility, BM)
        else:
            any_key = bounds.holes != 0
        # The copy engine itself gives zeros behind the last key.
        dirty_from = gl.where(clean_hi < visibility.num_keys, clean_hi, FAR)

        # With how many blocks left is the next tile asked for? Late: a program that takes a long tile shortly before
        # the end would end late. But where one consumer may have far fewer blocks than another, early: it keeps its
        # last block until it knows the next position.
        ask_at = count * 0
        if RANGE < 2:
            ask_at = gl.where(m0 + BM <= visibility.num_queries, gl.maximum(count - ASK_BLOCKS, 0), 0)
        if not KEYS_FIRST:
            _load_queries(descriptors, buffers, barriers, b, h, m0, tiles_done, C)
        for j in range(count):
            if C.mask == NO_MASK:
                n = begin + j * BN
            else:
                entry = next_entry
                next_entry = gl.load(entries + j + 1)
                n = entry // FLAGS * BN
            stage = use % STAGES
            phase = use // STAGES & 1
            mbarrier.wait(barriers.k_empty.index(stage), phase ^ 1)
            k_full = barriers.k_full.index(stage)
            mbarrier.expect(k_full, BN * (D0 + D1) * 2)
            tma_load(descriptors.k0, [b, kv_head, n, 0], k_full, buffers.k0.index(stage))
            if D1 > 0:
                tma_load(descriptors.k1, [b, kv_head, n, D0], k_full, buffers.k1.index(stage))
            if KEYS_FIRST:
                if j == 0:
                    _load_queries(descriptors, buffers, barriers, b, h, m0, tiles_done, C)
            if C.mask == BIAS:
                load_mask_tiles(call, b, h, m0, n, use, C)
            mbarrier.wait(barriers.v_empty.index(stage), phase ^ 1)
            look = any_key
            if C.mask != NO_MASK:
                limited = limits_rows(Range, b, m0, bounds, visibility, n, BM, BN, RANGE)
                gaps = ((entry & GAPS) != 0) | (((entry & HIDES) != 0) & limited)
                look = any_key | gaps
            if look | (n < clean_lo) | (n + BN > dirty_from):
                mbarrier.expect(barriers.v_raw, BN * (DV0 + DV1) * 2)
                tma_load(descriptors.v0, [b, kv_head, n, 0], barriers.v_raw, buffers.v0.index(stage))
                if DV1 > 0:
                    tma_load(descriptors.v1, [b, kv_head, n, DV0], barriers.v_raw, buffers.v1.index(stage))
                by_range = any_key
                if C.mask != NO_MASK:
                    by_range = any_key & (gaps == 0)
                    if gaps:
                        write_left_keys(buffers.keep, entry, b, h, m0, clean_lo, clean_hi, any_key, bounds, call, BM, C)
                if RANGE > 0:
                    if by_range:
                        write_seen_keys(Range, buffers.keep, b, m0, n, clean_lo, clean_hi, visibility, BM, BN, RANGE)
                mbarrier.wait(barriers.v_raw, scrubs & 1)
                scrubs += 1
                values = buffers.v0.index(stage).reshape([BN, DV0])
                scrub(values, buffers.keep, n, clean_lo, clean_hi, look, BN, DV0)
                if DV1 > 0:
                    values1 = buffers.v1.index(stage).reshape([BN, DV1])
                    scrub(values1, buffers.keep, n, clean_lo, clean_hi, look, BN, DV1)
                fence_async_shared()
                barrier()
                mbarrier.arrive(barriers.v_full.index(stage), count=1)
            else:
                mbarrier.expect(barriers.v_full.index(stage), BN * (DV0 + DV1) * 2)
                tma_load(descriptors.v0, [b, kv_head, n, 0], barriers.v_full.index(stage), buffers.v0.index(stage))
                if DV1 > 0:
                    tma_load(
                        descriptors.v1, [b, kv_head, n, DV0], barriers.v_full.index(stage), buffers.v1.index(stage)
                    )
            use += 1
            if j == ask_at:
                mbarrier.arrive(call.queue.asked, count=1)
        b, h, tile = next_position(call.queue, tiles_done, 1)
        tiles_done += 1

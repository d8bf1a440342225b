"""The producer warp of `dkdv`: it brings K, V, Q and dO, and two numbers of each query."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..schedule import next_position, position_of
from ..triton_api import copy_async, tma_load
from .key_tile import key_tile
from .load import load_block
from .masks import KEYS, query_shift, seeing_queries, span_of
from .records import CleanRows

# With how many blocks left to fetch a program asks for its next tile.
ASK_BLOCKS = gl.constexpr(4)


@gluon.jit
def _places(BM: gl.constexpr):
    """The places of a block's queries, BM // 32 of them a thread."""
    return gl.arange(0, BM, gl.BlockedLayout([BM // 32], [32], [1], [0]))


@gluon.jit
def _copy_rows(smem, row, full, BM: gl.constexpr):
    """Copy a number of each query `[BM]`; `full` counts one arrival of each thread."""
    copy_async(smem, row + _places(BM))
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def _copy_words(words, q_stage, row, of_delta, C: gl.constexpr):
    """Copy both words of each query, `[BM]` each. The arrival of a later `_copy_rows` counts for it too."""
    row = row + of_delta + of_delta
    copy_async(words.index(q_stage), row + _places(C.block_m))
    copy_async(words.index(C.query_stages + q_stage), row + of_delta + _places(C.block_m))


@gluon.jit
def _copy_ranges(lo_smem, hi_smem, line, m, visibility, BM: gl.constexpr):
    """Copy which keys each query from m on sees, `[BM]` each. The arrival of a later `_copy_rows` counts for it too."""
    queries = m + gl.arange(0, BM, gl.BlockedLayout([1], [32], [1], [0]))
    lo = line + queries.to(gl.int64) * visibility.stride_rs
    copy_async(lo_smem, lo, mask=queries < visibility.num_queries)
    copy_async(hi_smem, lo + 1, mask=queries < visibility.num_queries)


@gluon.jit
def _may_be_blind(call, b, n0, begin, end, bounds, shift, C: gl.constexpr):
    """Whether the blocks of queries [begin, end) may hold one that sees no key at all: that one may be NaN."""
    if C.range_layout == 2:
        may = begin != begin
        for c in gl.static_range(C.tile_keys // KEYS):
            may = may | (gl.load(span_of(call, b, n0 + c * KEYS) + 6) != 0)
    else:
        seeing_from, seeing_to = seeing_queries(bounds)
        first = gl.maximum(begin * C.block_m - shift, 0)
        behind = gl.minimum(end * C.block_m - shift, call.visibility.num_queries)
        may = (bounds.holes != 0) | (first < seeing_from) | (behind > seeing_to)
    return may


@gluon.jit
def _write_seeing(lse, keep, m, num_queries, BM: gl.constexpr):
    """Whether a query of the block from m on sees no key at all; where one does not, `keep` says which do.

    Args:
        lse: of the block, see `preprocess`.
    """
    places = _places(BM)
    blind = gl.load(lse + places) == float("-inf")
    there = (m + places >= 0) & (m + places < num_queries)
    any_blind = gl.max((blind & there).to(gl.int32), axis=0) != 0
    if any_blind:
        keep.store((blind == 0).to(gl.int32))
    return any_blind


@gluon.jit
def _load_keys(call, b, kv_head, n0, tiles_done, C: gl.constexpr):
    """Copy a tile's keys and values, each consumer's when it has done with those before."""
    descriptors = call.descriptors
    if C.shared_keys:
        mbarrier.wait(call.barriers.kv_empty.index(0), (tiles_done & 1) ^ 1)
        mbarrier.expect(call.barriers.kv_full.index(0), KEYS * C.d * 2)
        tma_load(descriptors.k, [b, kv_head, n0, 0], call.barriers.kv_full.index(0), call.buffers.k.index(0))
        mbarrier.wait(call.barriers.kv_empty.index(1), (tiles_done & 1) ^ 1)
        mbarrier.expect(call.barriers.kv_full.index(1), KEYS * C.dv * 2)
        tma_load(descriptors.v, [b, kv_head, n0, 0], call.barriers.kv_full.index(1), call.buffers.v.index(0))
    for c in gl.static_range(0 if C.shared_keys else 2):
        mbarrier.wait(call.barriers.kv_empty.index(c), (tiles_done & 1) ^ 1)
        kv_full = call.barriers.kv_full.index(c)
        mbarrier.expect(kv_full, KEYS * (C.d + C.dv) * 2)
        tma_load(descriptors.k, [b, kv_head, n0 + c * KEYS, 0], kv_full, call.buffers.k.index(c))
        tma_load(descriptors.v, [b, kv_head, n0 + c * KEYS, 0], kv_full, call.buffers.v.index(c))


@gluon.jit
def produce(call, C: gl.constexpr):
    """The producer warp: copies K and V once a tile, Q and dO block by block, ahead of the consumers.

    It asks for the next tile when this one's keys were loaded: then each thread of the consumers has read the position
    that the next one overwrites (see `hand_out`). So it loads them for tiles that no query sees too.
    """
    BM: gl.constexpr = C.block_m
    QS: gl.constexpr = C.query_stages
    GS: gl.constexpr = C.grad_stages
    descriptors = call.descriptors
    buffers = call.buffers
    barriers = call.barriers
    pointers = call.pointers
    num_kv_heads = call.heads.num_heads
    group = call.heads.group
    position = position_of(gl.program_id(0), num_kv_heads, call.order)
    tiles_done = 0
    use = 0
    scrubs = 0
    while position.tile >= 0:
        b, kv_head, n0, begin, end, bounds = key_tile(position, call, C)
        shift = query_shift(bounds, BM)
        ask_at = gl.maximum((end - begin) * group - ASK_BLOCKS, 0)
        if begin == end:
            _load_keys(call, b, kv_head, n0, tiles_done, C)
            mbarrier.arrive(call.queue.asked, count=1)
        may_be_blind = _may_be_blind(call, b, n0, begin, end, bounds, shift, C)
        done = 0
        for g in range(group):
            h = kv_head * group + g
            head = pointers.rows + (b * num_kv_heads * group + h).to(gl.int64) * pointers.places
            for i in range(begin, end):
                q_stage = use % QS
                g_stage = use % GS
                mbarrier.wait(barriers.q_empty.index(q_stage), (use // QS & 1) ^ 1)
                q_full = barriers.q_full.index(q_stage)
                m = i * BM - shift
                dirty = may_be_blind
                if may_be_blind:
                    dirty = _write_seeing(head + i * BM, buffers.keep, m, call.visibility.num_queries, BM)
                clean = CleanRows(lo=m, hi=m + BM, any=dirty)
                scrubs = load_block(
                    descriptors.q, b, h, m, buffers.q.index(q_stage), q_full, scrubs, dirty, clean, call, BM, C.d
                )
                if C.range_layout == 2:
                    line = pointers.key_range + b.to(gl.int64) * call.visibility.stride_rb
                    lo_smem, hi_smem = buffers.ranges.index(2 * q_stage), buffers.ranges.index(2 * q_stage + 1)
                    _copy_ranges(lo_smem, hi_smem, line, m, call.visibility, BM)
                if C.dropout:
                    _copy_words(buffers.words, q_stage, head + i * BM, pointers.of_delta, C)
                _copy_rows(buffers.lse.index(q_stage), head + i * BM, q_full, BM)
                mbarrier.wait(barriers.g_empty.index(g_stage), (use // GS & 1) ^ 1)
                g_full = barriers.g_full.index(g_stage)
                scrubs = load_block(
                    descriptors.g, b, h, m, buffers.g.index(g_stage), g_full, scrubs, dirty, clean, call, BM, C.dv
                )
                _copy_rows(buffers.delta.index(g_stage), head + pointers.of_delta + i * BM, g_full, BM)
                use += 1
                if done == 0:  # behind the first queries, which need not wait for the tile before
                    _load_keys(call, b, kv_head, n0, tiles_done, C)
                if done == ask_at:
                    mbarrier.arrive(call.queue.asked, count=1)
                done += 1
        position = next_position(call.queue, tiles_done, 1)
        tiles_done += 1

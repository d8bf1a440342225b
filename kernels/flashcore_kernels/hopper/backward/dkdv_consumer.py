"""The consumers of `dkdv`: each keeps 64 keys of a tile."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..copies import release
from ..dropout import computed_here, marked_columns, score_gradient
from ..schedule import next_position, position_of
from .key_tile import blocks_of_keys, key_tile
from .masks import KEYS, keep_queries, keep_ranges, query_shift, seen_keys, seen_of_span
from .products import as_operand, capped, product, product_onto, started_at, stays_as_operand
from .store import store_rows


@gluon.jit
def kept_keys(call, b, k0, bounds, LAYOUT: gl.constexpr, C: gl.constexpr):
    """Which of a consumer's 64 keys some query sees, for the rows of an accumulator of this layout."""
    keys = k0 + gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT))
    if C.range_layout == 2:
        keep = seen_of_span(call, b, keys)
    else:
        line = call.pointers.key_range
        if C.range_layout == 1:
            line = call.pointers.key_range + b.to(gl.int64) * call.visibility.stride_rb
        keep = seen_keys(bounds, line, keys, call.visibility, C.range_layout)
    return keep


@gluon.jit
def store_gradient(call, gradient, strides, acc, keep, b, kv_head, k0, LAYOUTS: gl.constexpr):
    """Write a consumer's sums `[64, columns]` to a gradient `[B, Hkv, K, columns]`."""
    head = gradient + b.to(gl.int64) * strides.stride_b * 8 + kv_head.to(gl.int64) * strides.stride_h * 8
    store_rows(head, acc, keep, k0, call.visibility.num_keys, strides, call.buffers.q.dtype, LAYOUTS)


@gluon.jit
def hidden_zeroed(p, edge, k0, m, q_stage, bounds, call, C: gl.constexpr):
    """P^T `[64, BM]` of the keys from k0 and the queries from m on, zero where a query does not see a key.

    Args:
        edge: whether there is such a pair.
    """
    if edge:
        if C.range_layout == 2:
            ranges = call.buffers.ranges
            p = keep_ranges(p, ranges.index(2 * q_stage), ranges.index(2 * q_stage + 1), k0)
        else:
            p = keep_queries(p, bounds, k0, m)
    return p


@gluon.jit
def dropped_marked(p, k0, q_stage, bounds, call, C: gl.constexpr):
    """P^T `[64, BM]` of the keys from k0 and the queries in this stage on, as `minus_below` leaves it."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, p.type.layout)
    words = call.buffers.words
    keys = computed_here(k0 - bounds.first) + gl.arange(0, KEYS, gl.SliceLayout(1, p.type.layout))
    column_0 = words.index(q_stage).load(COLUMNS).to(gl.uint32, bitcast=True)
    column_1 = words.index(C.query_stages + q_stage).load(COLUMNS).to(gl.uint32, bitcast=True)
    return marked_columns(p, keys, column_0, column_1, call.drop_below)


@gluon.jit
def dropped_gradient(p, dp, delta_smem):
    """`score_gradient` with the deltas of a block of queries `[BM]`."""
    delta = delta_smem.load(gl.SliceLayout(0, p.type.layout))
    return score_gradient(p, dp, delta[None, :])


@gluon.jit
def _pass_over_blocks(count, use, barriers, C: gl.constexpr):
    """Release blocks that only the other consumer sees. Not before they are full: it would count for older ones."""
    for _ in range(count):
        mbarrier.wait(barriers.q_full.index(use % C.query_stages), use // C.query_stages & 1)
        release(barriers.q_empty.index(use % C.query_stages))
        mbarrier.wait(barriers.g_full.index(use % C.grad_stages), use // C.grad_stages & 1)
        release(barriers.g_empty.index(use % C.grad_stages))
        use += 1
    return use


@gluon.jit
def _step(dk, dv, use, m, edge, k, v, k0, bounds, call, C: gl.constexpr):
    """One block of queries: its part of dK and dV.

    Args:
        dk, dv: of the blocks before.
        use: how many blocks this consumer has computed or passed over: the block's stages and phases follow from it.
        m: the block's first query. It may be negative: then the first ones do not exist.
        edge: whether P is masked.
        k, v: the consumer's keys and values, in shared memory; k0 is its first key.
        bounds, call: SequenceBounds, a Call.
    """
    BM: gl.constexpr = C.block_m
    D: gl.constexpr = C.d
    DV: gl.constexpr = C.dv
    buffers = call.buffers
    barriers = call.barriers
    score_scale = call.factors.score_scale
    dtype: gl.constexpr = buffers.q.dtype
    q_stage = use % C.query_stages
    g_stage = use % C.grad_stages
    q = buffers.q.index(q_stage).reshape([BM, D])
    g = buffers.g.index(g_stage).reshape([BM, DV])
    mbarrier.wait(barriers.q_full.index(q_stage), use // C.query_stages & 1)
    if C.softcap:
        # tanh wants the scores by themselves, and has no registers beside dP.
        s = warpgroup_mma_wait(0, deps=[product(k, q, BM)])
        t, slope = capped(s, score_scale)
        lse = buffers.lse.index(q_stage).load(gl.SliceLayout(0, s.type.layout))
        x = gl.fma(t, gl.full_like(t, 0.0) + call.factors.cap_scale, gl.full_like(t, 0.0) + lse[None, :])
        mbarrier.wait(barriers.g_full.index(g_stage), use // C.grad_stages & 1)
        if C.dropout:
            dp = product(v, g, BM)
        else:
            dp = product_onto(v, g, started_at(buffers.delta.index(g_stage), BM))
        p = gl.exp2(x)
    else:
        # Both before either product: ptxas lets no register be written to start one while another is under way.
        s = started_at(buffers.lse.index(q_stage), BM)
        mbarrier.wait(barriers.g_full.index(g_stage), use // C.grad_stages & 1)
        if C.dropout:
            s = product_onto(k, q, s)
            dp = product(v, g, BM)
        else:
            dp = started_at(buffers.delta.index(g_stage), BM)
            s = product_onto(k, q, s)
            dp = product_onto(v, g, dp)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * score_scale)
    p = hidden_zeroed(p, edge, k0, m, q_stage, bounds, call, C)
    if C.dropout:
        p = dropped_marked(p, k0, q_stage, bounds, call, C)
        dv = warpgroup_mma(stays_as_operand(p, dtype, DV), g, dv, is_async=True)
    else:
        dv = warpgroup_mma(as_operand(p, dtype, DV), g, dv, is_async=True)
    if C.softcap:
        p = p * slope
    dp = warpgroup_mma_wait(1, deps=[dp])
    if C.dropout:
        ds = dropped_gradient(p, dp, buffers.delta.index(g_stage))
    else:
        ds = p * dp
    dk = warpgroup_mma(as_operand(ds, dtype, D), q, dk, is_async=True)
    dv = warpgroup_mma_wait(1, deps=[dv])
    release(barriers.g_empty.index(g_stage))
    dk = warpgroup_mma_wait(0, deps=[dk])
    release(barriers.q_empty.index(q_stage))
    return dk, dv


@gluon.jit
def consume(CONSUMER: gl.constexpr, call, C: gl.constexpr):
    """A consumer: its keys of each tile, one tile after the other."""
    BM: gl.constexpr = C.block_m
    D: gl.constexpr = C.d
    DV: gl.constexpr = C.dv
    KEY_LAYOUTS: gl.constexpr = C.key_layouts
    VALUE_LAYOUTS: gl.constexpr = C.value_layouts
    DK_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    buffers = call.buffers
    barriers = call.barriers
    pointers = call.pointers
    key_strides = pointers.key_strides
    value_strides = pointers.value_strides
    k = buffers.k.index(CONSUMER).reshape([KEYS, D])
    v = buffers.v.index(CONSUMER).reshape([KEYS, DV])
    position = position_of(gl.program_id(0), call.heads.num_heads, call.order)
    tiles_done = 0
    use = 0
    while position.tile >= 0:
        b, kv_head, n0, begin, end, bounds = key_tile(position, call, C)
        k0 = n0 + CONSUMER * KEYS
        shift = query_shift(bounds, BM)
        own_begin, own_end, whole_begin, whole_end = blocks_of_keys(call, b, k0, bounds, C)
        own_begin = gl.where(own_begin < own_end, own_begin, begin)
        own_end = gl.maximum(own_begin, own_end)
        dk = gl.zeros([KEYS, D], gl.float32, DK_LAYOUT)
        dv = gl.zeros([KEYS, DV], gl.float32, DV_LAYOUT)
        mbarrier.wait(barriers.kv_full.index(CONSUMER), tiles_done & 1)
        for _ in range(call.heads.group):
            use = _pass_over_blocks(own_begin - begin, use, barriers, C)
            for i in range(own_begin, own_end):
                edge = (i < whole_begin) | (i >= whole_end)
                dk, dv = _step(dk, dv, use, i * BM - shift, edge, k, v, k0, bounds, call, C)
                use += 1
            use = _pass_over_blocks(end - own_end, use, barriers, C)
        release(barriers.kv_empty.index(CONSUMER))
        if C.dropout:
            dv = dv * call.value_scale
        keep = kept_keys(call, b, k0, bounds, DK_LAYOUT, C)
        store_gradient(call, pointers.grad_key, key_strides, dk * call.grad_scale, keep, b, kv_head, k0, KEY_LAYOUTS)
        store_gradient(call, pointers.grad_value, value_strides, dv, keep, b, kv_head, k0, VALUE_LAYOUTS)
        position = next_position(call.queue, tiles_done, 4)
        tiles_done += 1

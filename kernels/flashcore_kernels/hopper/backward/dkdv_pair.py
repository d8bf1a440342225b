"""The consumers of `dkdv` where dK and dV of 64 keys are too many registers for one: one makes dV, the other dK.

    the first: S^T = K Q^T, P^T = exp(S^T - lse), dV += P^T dO
    the second: dP^T = V dO^T, dS^T = P^T * (dP^T - delta), dK += dS^T Q

P^T goes from the first to the second through shared memory, in fp32. Nothing is computed twice. While the first takes
exponentials the second's products keep the tensor cores busy.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..copies import release
from ..schedule import next_position, position_of
from .dkdv_consumer import dropped_gradient, dropped_marked, hidden_zeroed, kept_keys, store_gradient
from .key_tile import blocks_of_keys, key_tile
from .masks import KEYS, query_shift
from .products import as_operand, capped, product, product_onto, started_at, stays_as_operand


@gluon.jit
def _value_step(dv, use, m, edge, k, k0, bounds, call, C: gl.constexpr):
    """One block of queries: its part of dV, and its P for the other consumer. Arguments: see `dkdv_consumer._step`."""
    BM: gl.constexpr = C.block_m
    buffers = call.buffers
    barriers = call.barriers
    score_scale = call.factors.score_scale
    q_stage = use % C.query_stages
    g_stage = use % C.grad_stages
    q = buffers.q.index(q_stage).reshape([BM, C.d])
    g = buffers.g.index(g_stage).reshape([BM, C.dv])
    mbarrier.wait(barriers.q_full.index(q_stage), use // C.query_stages & 1)
    if C.softcap:
        s = warpgroup_mma_wait(0, deps=[product(k, q, BM)])
        t, slope = capped(s, score_scale)
        lse = buffers.lse.index(q_stage).load(gl.SliceLayout(0, s.type.layout))
        p = gl.exp2(gl.fma(t, gl.full_like(t, 0.0) + call.factors.cap_scale, gl.full_like(t, 0.0) + lse[None, :]))
    else:
        s = warpgroup_mma_wait(0, deps=[product_onto(k, q, started_at(buffers.lse.index(q_stage), BM))])
        p = gl.exp2(s * score_scale)
    p = hidden_zeroed(p, edge, k0, m, q_stage, bounds, call, C)
    if C.dropout:
        p = dropped_marked(p, k0, q_stage, bounds, call, C)
    else:
        release(barriers.q_empty.index(q_stage))
    mbarrier.wait(barriers.p_empty, (use & 1) ^ 1)
    if C.softcap:
        buffers.p.store(p * slope)
    else:
        buffers.p.store(p)
    mbarrier.arrive(barriers.p_full, count=1)
    if C.dropout:  # before P was stored, its queries' words need not have arrived in the registers
        release(barriers.q_empty.index(q_stage))
    mbarrier.wait(barriers.g_full.index(g_stage), use // C.grad_stages & 1)
    if C.dropout:
        dv = warpgroup_mma(stays_as_operand(p, buffers.q.dtype, C.dv), g, dv, is_async=True)
    else:
        dv = warpgroup_mma(as_operand(p, buffers.q.dtype, C.dv), g, dv, is_async=True)
    dv = warpgroup_mma_wait(0, deps=[dv])
    release(barriers.g_empty.index(g_stage))
    return dv


@gluon.jit
def _key_step(dk, use, v, call, C: gl.constexpr):
    """One block of queries: its part of dK, from the P that the other consumer has made."""
    BM: gl.constexpr = C.block_m
    P_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    buffers = call.buffers
    barriers = call.barriers
    q_stage = use % C.query_stages
    g_stage = use % C.grad_stages
    q = buffers.q.index(q_stage).reshape([BM, C.d])
    g = buffers.g.index(g_stage).reshape([BM, C.dv])
    mbarrier.wait(barriers.g_full.index(g_stage), use // C.grad_stages & 1)
    if C.dropout:
        dp = product(v, g, BM)
    else:
        dp = product_onto(v, g, started_at(buffers.delta.index(g_stage), BM))
    mbarrier.wait(barriers.p_full, use & 1)
    p = buffers.p.load(P_LAYOUT)
    dp = warpgroup_mma_wait(0, deps=[dp])
    if not C.dropout:
        release(barriers.g_empty.index(g_stage))
    mbarrier.wait(barriers.q_full.index(q_stage), use // C.query_stages & 1)
    if C.dropout:
        ds = dropped_gradient(p, dp, buffers.delta.index(g_stage))
    else:
        ds = p * dp
    dk = warpgroup_mma(as_operand(ds, buffers.q.dtype, C.d), q, dk, is_async=True)
    # Not before: until this product is under way P, and delta, need not have arrived in the registers.
    release(barriers.p_empty)
    if C.dropout:
        release(barriers.g_empty.index(g_stage))
    dk = warpgroup_mma_wait(0, deps=[dk])
    release(barriers.q_empty.index(q_stage))
    return dk


@gluon.jit
def consume_of_pair(CONSUMER: gl.constexpr, call, C: gl.constexpr):
    """A consumer: dV (the first) or dK (the second) of each tile, one tile after the other."""
    COLUMNS: gl.constexpr = C.d if CONSUMER == 1 else C.dv
    LAYOUTS: gl.constexpr = C.key_layouts if CONSUMER == 1 else C.value_layouts
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    barriers = call.barriers
    pointers = call.pointers
    k = call.buffers.k.index(0).reshape([KEYS, C.d])
    v = call.buffers.v.index(0).reshape([KEYS, C.dv])
    position = position_of(gl.program_id(0), call.heads.num_heads, call.order)
    tiles_done = 0
    use = 0
    while position.tile >= 0:
        b, kv_head, k0, begin, end, bounds = key_tile(position, call, C)
        shift = query_shift(bounds, C.block_m)
        _, _, whole_begin, whole_end = blocks_of_keys(call, b, k0, bounds, C)
        acc = gl.zeros([KEYS, COLUMNS], gl.float32, LAYOUT)
        mbarrier.wait(barriers.kv_full.index(CONSUMER), tiles_done & 1)
        for _ in range(call.heads.group):
            for i in range(begin, end):
                if CONSUMER == 0:
                    edge = (i < whole_begin) | (i >= whole_end)
                    acc = _value_step(acc, use, i * C.block_m - shift, edge, k, k0, bounds, call, C)
                else:
                    acc = _key_step(acc, use, v, call, C)
                use += 1
        release(barriers.kv_empty.index(CONSUMER))
        keep = kept_keys(call, b, k0, bounds, LAYOUT, C)
        if CONSUMER == 0:
            if C.dropout:
                acc = acc * call.value_scale
            store_gradient(call, pointers.grad_value, pointers.value_strides, acc, keep, b, kv_head, k0, LAYOUTS)
        else:
            acc = acc * call.grad_scale
            store_gradient(call, pointers.grad_key, pointers.key_strides, acc, keep, b, kv_head, k0, LAYOUTS)
        position = next_position(call.queue, tiles_done, 4)
        tiles_done += 1

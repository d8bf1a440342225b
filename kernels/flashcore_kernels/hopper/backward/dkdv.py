"""dK and dV: two consumer warpgroups keep 64 keys each, and the queries that see them stream past.

    S^T = K Q^T, P^T = exp(S^T - lse), dP^T = V dO^T, dS^T = P^T * (dP^T - delta)
    dV += P^T dO, dK += dS^T Q, and dK is multiplied by scale in the end

Keys are rows, so P^T and dS^T are first operands from the registers, and K and V lie in shared memory all the time. One
tile is a block of keys of one KV head; it sees the queries of each head of its group in turn, so that no other tile
adds to its sums. Lse and delta are what the products S^T and dP^T start from (see `started_at`).

As in the forward, programs are persistent: a scheduler warp draws tiles, a producer warp brings Q and dO ahead of the
consumers, and these share nothing but what they read.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..copies import release
from ..records import Heads, Queue, ScoreFactors, TileOrder
from ..schedule import hand_out, next_position, position_of
from ..triton_api import SHARED_WORKER_ARGUMENTS, copy_async, tma_load
from ..visible import Visibility, sequence_bounds
from .masks import first_key, keep_queries, query_blocks, query_shift, seen_keys, whole_blocks
from .products import as_operand, capped, product, product_onto, started_at
from .records import Call, Descriptors, DkdvBarriers, DkdvBuffers, DkdvPointers, GradientStrides, KeyTile
from .store import store_layouts, store_rows

# With how many blocks left to fetch a program asks for its next tile.
ASK_BLOCKS = gl.constexpr(4)
# Keys of a consumer, and of a tile.
KEYS = gl.constexpr(64)
BLOCK_N = gl.constexpr(128)


@dataclass(frozen=True)
class DkdvConstants:
    """Everything that one compiled kernel is made for.

    Attributes:
        d, dv: columns of the tiles of Q and K, and of dO and V: powers of two.
        block_m: queries of a block.
        query_stages, grad_stages: blocks of Q and of dO in shared memory.
        range_layout: 0 no KeyRange, 1 a line a sequence.
        softcap: whether there is any.
        consumer_registers, producer_registers: of a thread.
    """

    d: int
    dv: int
    block_m: int
    query_stages: int
    grad_stages: int
    range_layout: int
    softcap: bool
    consumer_registers: int
    producer_registers: int

    @property
    def key_layouts(self) -> tuple:
        """Of dK, see `store_layouts`."""
        return store_layouts(self.d)

    @property
    def value_layouts(self) -> tuple:
        """Of dV."""
        return store_layouts(self.dv)


@gluon.jit
def _tile(position, call, C: gl.constexpr):
    """The KeyTile at this TilePosition. Any tile where there is none."""
    b, kv_head, number = position
    bounds = sequence_bounds(call.pointers.key_range, b, call.visibility, C.range_layout)
    # The keys that most queries see first, under causal attention: `position_of` numbers the other way round.
    n0 = first_key(bounds, call.order.tiles_per_head - 1 - gl.maximum(number, 0), BLOCK_N)
    begin, end = query_blocks(bounds, n0, call.visibility.num_queries, C.block_m, BLOCK_N)
    return KeyTile(b=b, kv_head=kv_head, n0=n0, begin=begin, end=end, bounds=bounds)


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
        dp = product_onto(v, g, started_at(buffers.delta.index(g_stage), BM))
        p = gl.exp2(x)
    else:
        # Both before either product: ptxas lets no register be written to start one while another is under way.
        s = started_at(buffers.lse.index(q_stage), BM)
        mbarrier.wait(barriers.g_full.index(g_stage), use // C.grad_stages & 1)
        dp = started_at(buffers.delta.index(g_stage), BM)
        s = product_onto(k, q, s)
        dp = product_onto(v, g, dp)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * score_scale)
    if edge:
        p = keep_queries(p, bounds, k0, m)
    dv = warpgroup_mma(as_operand(p, dtype, DV), g, dv, is_async=True)
    if C.softcap:
        p = p * slope
    dp = warpgroup_mma_wait(1, deps=[dp])
    dk = warpgroup_mma(as_operand(p * dp, dtype, D), q, dk, is_async=True)
    dv = warpgroup_mma_wait(1, deps=[dv])
    release(barriers.g_empty.index(g_stage))
    dk = warpgroup_mma_wait(0, deps=[dk])
    release(barriers.q_empty.index(q_stage))
    return dk, dv


@gluon.jit
def _consume(CONSUMER: gl.constexpr, call, C: gl.constexpr):
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
    visibility = call.visibility
    num_keys = visibility.num_keys
    key_strides = pointers.key_strides
    value_strides = pointers.value_strides
    dtype: gl.constexpr = buffers.q.dtype
    k = buffers.k.index(CONSUMER).reshape([KEYS, D])
    v = buffers.v.index(CONSUMER).reshape([KEYS, DV])
    position = position_of(gl.program_id(0), call.heads.num_heads, call.order)
    tiles_done = 0
    use = 0
    while position.tile >= 0:
        b, kv_head, n0, begin, end, bounds = _tile(position, call, C)
        k0 = n0 + CONSUMER * KEYS
        shift = query_shift(bounds, BM)
        own_begin, own_end = query_blocks(bounds, k0, visibility.num_queries, BM, KEYS)
        whole_begin, whole_end = whole_blocks(bounds, k0, BM, KEYS)
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
        keys = k0 + gl.arange(0, KEYS, gl.SliceLayout(1, DK_LAYOUT))
        line = pointers.key_range
        if C.range_layout == 1:
            line = pointers.key_range + b.to(gl.int64) * visibility.stride_rb
        keep = seen_keys(bounds, line, keys, visibility, C.range_layout)
        head = pointers.grad_key + b.to(gl.int64) * (key_strides.stride_b * 8)
        head = head + kv_head.to(gl.int64) * (key_strides.stride_h * 8)
        store_rows(head, dk * call.grad_scale, keep, k0, num_keys, key_strides, dtype, KEY_LAYOUTS)
        head = pointers.grad_value + b.to(gl.int64) * (value_strides.stride_b * 8)
        head = head + kv_head.to(gl.int64) * (value_strides.stride_h * 8)
        store_rows(head, dv, keep, k0, num_keys, value_strides, dtype, VALUE_LAYOUTS)
        position = next_position(call.queue, tiles_done, 4)
        tiles_done += 1


@gluon.jit
def _consumer_0(call, C: gl.constexpr):
    _consume(0, call, C)


@gluon.jit
def _consumer_1(call, C: gl.constexpr):
    _consume(1, call, C)


@gluon.jit
def _copy_rows(smem, row, full, BM: gl.constexpr):
    """Copy a number of each query `[BM]`; `full` counts one arrival of each thread."""
    copy_async(smem, row + gl.arange(0, BM, gl.BlockedLayout([BM // 32], [32], [1], [0])))
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def _load_keys(call, b, kv_head, n0, tiles_done, C: gl.constexpr):
    """Copy a tile's keys and values, each consumer's when it has done with those before."""
    descriptors = call.descriptors
    for c in gl.static_range(2):
        mbarrier.wait(call.barriers.kv_empty.index(c), (tiles_done & 1) ^ 1)
        kv_full = call.barriers.kv_full.index(c)
        mbarrier.expect(kv_full, KEYS * (C.d + C.dv) * 2)
        tma_load(descriptors.k, [b, kv_head, n0 + c * KEYS, 0], kv_full, call.buffers.k.index(c))
        tma_load(descriptors.v, [b, kv_head, n0 + c * KEYS, 0], kv_full, call.buffers.v.index(c))


@gluon.jit
def _produce(call, C: gl.constexpr):
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
    while position.tile >= 0:
        b, kv_head, n0, begin, end, bounds = _tile(position, call, C)
        shift = query_shift(bounds, BM)
        ask_at = gl.maximum((end - begin) * group - ASK_BLOCKS, 0)
        if begin == end:
            _load_keys(call, b, kv_head, n0, tiles_done, C)
            mbarrier.arrive(call.queue.asked, count=1)
        done = 0
        for g in range(group):
            h = kv_head * group + g
            head = pointers.rows + (b * num_kv_heads * group + h).to(gl.int64) * pointers.places
            for i in range(begin, end):
                q_stage = use % QS
                g_stage = use % GS
                mbarrier.wait(barriers.q_empty.index(q_stage), (use // QS & 1) ^ 1)
                q_full = barriers.q_full.index(q_stage)
                mbarrier.expect(q_full, BM * C.d * 2)
                tma_load(descriptors.q, [b, h, i * BM - shift, 0], q_full, buffers.q.index(q_stage))
                _copy_rows(buffers.lse.index(q_stage), head + i * BM, q_full, BM)
                mbarrier.wait(barriers.g_empty.index(g_stage), (use // GS & 1) ^ 1)
                g_full = barriers.g_full.index(g_stage)
                mbarrier.expect(g_full, BM * C.dv * 2)
                tma_load(descriptors.g, [b, h, i * BM - shift, 0], g_full, buffers.g.index(g_stage))
                _copy_rows(buffers.delta.index(g_stage), head + pointers.of_delta + i * BM, g_full, BM)
                use += 1
                if done == 0:  # behind the first queries, which need not wait for the tile before
                    _load_keys(call, b, kv_head, n0, tiles_done, C)
                if done == ask_at:
                    mbarrier.arrive(call.queue.asked, count=1)
                done += 1
        position = next_position(call.queue, tiles_done, 1)
        tiles_done += 1


_NOT_SPECIALIZED = [
    "num_kv_heads", "group", "num_queries", "num_keys", "query_start", "window_left", "window_right", "stride_rb",
    "stride_kb", "stride_kh", "stride_ks", "key_eights", "stride_vb", "stride_vh", "stride_vs", "value_eights",
    "all_heads", "tiles_per_head", "section",
]  # fmt: skip


@gluon.jit(do_not_specialize=_NOT_SPECIALIZED)
def flashcore_hopper_backward_dkdv(
    q_desc,
    g_desc,
    k_desc,
    v_desc,
    Rows,
    Range,
    GradKey,
    GradValue,
    Counter,
    places,
    of_delta,
    num_kv_heads,
    group,
    num_queries,
    num_keys,
    query_start,
    window_left,
    window_right,
    stride_rb,
    stride_kb,
    stride_kh,
    stride_ks,
    key_eights,
    stride_vb,
    stride_vh,
    stride_vs,
    value_eights,
    key_scale,
    score_scale,
    cap_scale,
    all_heads,
    tiles_per_head,
    section,
    C: gl.constexpr,
):
    """dK = scale dS^T Q and dV = P^T dO, over the queries that see each key.

    Shapes: descriptors of Q `[B, H, Q, D]`, of dO `[B, H, Q, Dv]` in blocks of `C.block_m` rows, of K and V in blocks
    of 64; Rows fp32 `[2, B * H, places]` as `preprocess` leaves it, `of_delta` elements between its halves; Range a
    KeyRange; GradKey `[B, Hkv, K, D]` and GradValue `[B, Hkv, K, Dv]` with strides and columns in units of 8 elements;
    Counter an int32 that is 0, and 0 again at the end. `all_heads` are those of keys.
    Grid: as many programs as run at once, or as there are tiles.
    """
    BM: gl.constexpr = C.block_m
    QS: gl.constexpr = C.query_stages
    GS: gl.constexpr = C.grad_stages
    dtype: gl.constexpr = q_desc.dtype
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    if C.range_layout == 0:
        Range = num_keys
    q_smem = gl.allocate_shared_memory(dtype, [QS, 1, 1, BM, C.d], q_desc.layout)
    g_smem = gl.allocate_shared_memory(dtype, [GS, 1, 1, BM, C.dv], g_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, KEYS, C.d], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, KEYS, C.dv], v_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [QS, BM], PLAIN)
    delta_smem = gl.allocate_shared_memory(gl.float32, [GS, BM], PLAIN)
    q_full = gl.allocate_shared_memory(gl.int64, [QS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [QS, 1], mbarrier.MBarrierLayout())
    g_full = gl.allocate_shared_memory(gl.int64, [GS, 1], mbarrier.MBarrierLayout())
    g_empty = gl.allocate_shared_memory(gl.int64, [GS, 1], mbarrier.MBarrierLayout())
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    positions = gl.allocate_shared_memory(gl.int32, [6, 1], PLAIN)
    position_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    position_asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    # A block is full when the copy engine and the producer's 32 threads have brought their part, see `_copy_rows`.
    for stage in gl.static_range(QS):
        mbarrier.init(q_full.index(stage), count=33)
        mbarrier.init(q_empty.index(stage), count=256)
    for stage in gl.static_range(GS):
        mbarrier.init(g_full.index(stage), count=33)
        mbarrier.init(g_empty.index(stage), count=256)
    for c in gl.static_range(2):
        mbarrier.init(kv_full.index(c), count=1)
        mbarrier.init(kv_empty.index(c), count=128)
        mbarrier.init(position_full.index(c), count=1)
    mbarrier.init(position_asked, count=1)
    fence_async_shared()
    pointers = DkdvPointers(
        rows=Rows, key_range=Range, grad_key=GradKey, grad_value=GradValue, places=places, of_delta=of_delta,
        key_strides=GradientStrides(stride_b=stride_kb, stride_h=stride_kh, stride_s=stride_ks, eights=key_eights),
        value_strides=GradientStrides(
            stride_b=stride_vb, stride_h=stride_vh, stride_s=stride_vs, eights=value_eights
        ),
    )  # fmt: skip
    call = Call(
        descriptors=Descriptors(q=q_desc, g=g_desc, k=k_desc, v=v_desc),
        buffers=DkdvBuffers(q=q_smem, g=g_smem, k=k_smem, v=v_smem, lse=lse_smem, delta=delta_smem),
        barriers=DkdvBarriers(
            q_full=q_full, q_empty=q_empty, g_full=g_full, g_empty=g_empty, kv_full=kv_full, kv_empty=kv_empty
        ),
        queue=Queue(positions=positions, full=position_full, asked=position_asked, counter=Counter),
        pointers=pointers,
        grad_scale=key_scale,
        heads=Heads(num_heads=num_kv_heads, group=group),
        visibility=Visibility(
            num_queries=num_queries, num_keys=num_keys, query_start=query_start, window_left=window_left,
            window_right=window_right, stride_rb=stride_rb, stride_rs=stride_rb,
        ),
        factors=ScoreFactors(score_scale=score_scale, cap_scale=cap_scale),
        order=TileOrder(all_heads=all_heads, tiles_per_head=tiles_per_head, section=section),
    )  # fmt: skip
    # The argument tuples stand in the calls: under a name their constexprs would become tensors.
    if SHARED_WORKER_ARGUMENTS:
        gl.warp_specialize(
            (call, C), _consumer_0,
            (call, C), [_consumer_1, _produce, hand_out],
            [4, 1, 1], [C.consumer_registers, C.producer_registers, C.producer_registers],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer_0, (call, C)),
                (_consumer_1, (call, C)),
                (_produce, (call, C)),
                (hand_out, (call, C)),
            ],
            [4, 1, 1], [C.consumer_registers, C.producer_registers, C.producer_registers],
        )  # fmt: skip

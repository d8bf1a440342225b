"""dQ: two consumer warpgroups keep 64 queries each, and the keys that they see stream past.

    S = Q K^T, P = exp(S - lse), dP = dO V^T, dS = P * (dP - delta), dQ += dS K, and is multiplied by scale in the end

With dropout dP is 0 where a weight is dropped; delta, and so dS, are a multiple of what they are, see `preprocess`.

Tiles, their order, blocks and masks are the forward's. K serves two products from the same place in shared memory. Keys
and values that nobody sees may hold NaN: here, where they are summed over, both are zeroed where blocks hold such.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..copies import release, write_seen_keys
from ..dropout import RowDropout, marked, score_gradient
from ..query_tile import pass_over_blocks, tile_of
from ..records import Heads, Queue, ScoreFactors, TileOrder
from ..schedule import hand_out, next_position, position_of
from ..triton_api import SHARED_WORKER_ARGUMENTS, tma_load
from ..visible import FAR, Visibility, sequence_bounds, tile_blocks, tile_keys
from .load import load_block
from .masks import any_unseen, keep_keys, query_shift, seen_of_span
from .products import as_operand, capped, product
from .records import Call, CleanRows, Descriptors, DqBarriers, DqBuffers, DqPointers, GradientStrides
from .store import store_layouts, store_rows

# With how many blocks left to fetch a program asks for its next tile.
ASK_BLOCKS = gl.constexpr(4)
ROWS = gl.constexpr(64)


@dataclass(frozen=True)
class DqConstants:
    """Everything that one compiled kernel is made for.

    Attributes:
        d, dv: columns of the tiles of Q and K, and of dO and V: powers of two.
        block_n: keys of a block.
        stages: blocks of K and V in shared memory.
        query_block: queries of a block of `dkdv`, on whose grid lse and delta lie.
        range_layout: 0 no KeyRange, 1 a line a sequence, 2 a line a query.
        softcap, dropout: whether there is any.
        consumer_registers, producer_registers: of a thread.
    """

    d: int
    dv: int
    block_n: int
    stages: int
    query_block: int
    range_layout: int
    softcap: bool
    dropout: bool
    consumer_registers: int
    producer_registers: int

    # What `tile_of` asks for.
    consumers = 2
    rows = 64
    warps = 4

    @property
    def layouts(self) -> tuple:
        """Of dQ, see `store_layouts`."""
        return store_layouts(self.d)


@gluon.jit
def _row_numbers(tile, call, C: gl.constexpr):
    """(-lse, -delta) of a consumer's queries `[64]`, and with `C.dropout` their RowDropout.

    lse is in units of log2, and -inf where a row saw no key.
    """
    LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.block_n, 16]))
    pointers = call.pointers
    num_queries = call.visibility.num_queries
    rows = tile.r0 + gl.arange(0, ROWS, LAYOUT)
    bounds = sequence_bounds(pointers.key_range, tile.b, call.visibility, C.range_layout)
    shift = query_shift(bounds, C.query_block)
    at = pointers.rows + tile.head_of_all.to(gl.int64) * pointers.places + shift + rows
    lse = gl.load(at, mask=rows < num_queries, other=float("-inf"))
    if not C.softcap:
        lse = lse * call.factors.score_scale
    at += pointers.of_delta
    delta = gl.load(at, mask=rows < num_queries, other=0.0)
    if C.dropout:
        at += pointers.of_delta
        row_0 = gl.load(at, mask=rows < num_queries, other=0.0)
        row_1 = gl.load(at + pointers.of_delta, mask=rows < num_queries, other=0.0)
        drop = RowDropout(
            row_0=row_0.to(gl.uint32, bitcast=True), row_1=row_1.to(gl.uint32, bitcast=True), first=bounds.first,
            drop_below=call.drop_below,
        )  # fmt: skip
        return lse, delta, drop
    else:
        return lse, delta, ()


@gluon.jit
def _step(dq, use, n, edge, q, g, lse, delta, drop, tile, line, call, C: gl.constexpr):
    """One block of keys: its part of dQ.

    Args:
        dq: of the blocks before.
        use: how many blocks this consumer has computed or passed over: the block's stage and phase follow from it.
        n: the block's first key.
        edge: whether P is masked row by row.
        q, g: its queries and their dO, in shared memory.
        lse, delta, drop: see `_row_numbers`.
        tile, call: a Tile, a Call.
        line: of the KeyRange, the sequence's.
    """
    BN: gl.constexpr = C.block_n
    D: gl.constexpr = C.d
    DV: gl.constexpr = C.dv
    barriers = call.barriers
    score_scale = call.factors.score_scale
    stage = use % C.stages
    phase = use // C.stages & 1
    k = call.buffers.k.index(stage).reshape([BN, D])
    v = call.buffers.v.index(stage).reshape([BN, DV])
    mbarrier.wait(barriers.k_full.index(stage), phase)
    s = product(q, k, BN)
    mbarrier.wait(barriers.v_full.index(stage), phase)
    dp = product(g, v, BN)
    s = warpgroup_mma_wait(1, deps=[s])
    if C.softcap:
        s, slope = capped(s, score_scale)
        x = gl.fma(s, gl.full_like(s, 0.0) + call.factors.cap_scale, gl.full_like(s, 0.0) + lse[:, None])
    else:
        x = gl.fma(s, gl.full_like(s, 0.0) + score_scale, gl.full_like(s, 0.0) + lse[:, None])
    p = gl.exp2(x)
    if edge:
        p = keep_keys(p, n, tile, line, call.visibility.num_keys, C.range_layout)
    if C.softcap:
        p = p * slope
    if C.dropout:
        p = marked(p, n, drop, C)
        dp, p = warpgroup_mma_wait(0, deps=[dp, p])
        release(barriers.v_empty.index(stage))
        ds = score_gradient(p, dp, delta[:, None])
    else:
        dp = warpgroup_mma_wait(0, deps=[dp])
        release(barriers.v_empty.index(stage))
        ds = p * (dp + delta[:, None])
    ds = as_operand(ds, call.buffers.q.dtype, D)
    dq = warpgroup_mma(ds, k, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[dq])
    release(barriers.k_empty.index(stage))
    return dq


@gluon.jit
def _consume(CONSUMER: gl.constexpr, call, C: gl.constexpr):
    """A consumer: its queries of each tile, one tile after the other."""
    BN: gl.constexpr = C.block_n
    D: gl.constexpr = C.d
    DV: gl.constexpr = C.dv
    LAYOUTS: gl.constexpr = C.layouts
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    buffers = call.buffers
    barriers = call.barriers
    pointers = call.pointers
    visibility = call.visibility
    strides = pointers.query_strides
    q = buffers.q.index(CONSUMER).reshape([ROWS, D])
    g = buffers.g.index(CONSUMER).reshape([ROWS, DV])
    position = position_of(gl.program_id(0), call.heads.num_heads, call.order)
    tile = tile_of(position, call, CONSUMER, C)
    lse, delta, drop = _row_numbers(tile, call, C)
    tiles_done = 0
    use = 0
    while position.tile >= 0:
        line = pointers.key_range
        if C.range_layout == 1:
            line = pointers.key_range + tile.b.to(gl.int64) * visibility.stride_rb
        dq = gl.zeros([ROWS, D], gl.float32, DQ_LAYOUT)
        mbarrier.wait(barriers.q_full.index(CONSUMER), tiles_done & 1)
        for j in range(tile.own_blocks):
            edge = (j < tile.left_edge) | (j >= tile.right_edge)
            dq = _step(dq, use, tile.begin + j * BN, edge, q, g, lse, delta, drop, tile, line, call, C)
            use += 1
        use = pass_over_blocks(use, tile, barriers, C)
        release(barriers.q_empty.index(CONSUMER))
        position = next_position(call.queue, tiles_done, 4)
        head = pointers.grad_query + tile.b.to(gl.int64) * strides.stride_b * 8
        head = head + tile.h.to(gl.int64) * strides.stride_h * 8
        keep = lse != float("-inf")
        dq = dq * call.grad_scale
        store_rows(head, dq, keep, tile.r0, visibility.num_queries, strides, buffers.q.dtype, LAYOUTS)
        tile = tile_of(position, call, CONSUMER, C)
        lse, delta, drop = _row_numbers(tile, call, C)
        tiles_done += 1


@gluon.jit
def _consumer_0(call, C: gl.constexpr):
    _consume(0, call, C)


@gluon.jit
def _consumer_1(call, C: gl.constexpr):
    _consume(1, call, C)


@gluon.jit
def _produce(call, C: gl.constexpr):
    """The producer warp: copies Q and dO once a tile, K and V block by block, ahead of the consumers."""
    BN: gl.constexpr = C.block_n
    STAGES: gl.constexpr = C.stages
    RANGE: gl.constexpr = C.range_layout
    descriptors = call.descriptors
    buffers = call.buffers
    barriers = call.barriers
    visibility = call.visibility
    num_queries = visibility.num_queries
    num_keys = visibility.num_keys
    Range = call.pointers.key_range
    b, h, tile = position_of(gl.program_id(0), call.heads.num_heads, call.order)
    tiles_done = 0
    use = 0
    scrubs = 0
    while tile >= 0:
        kv_head = h // call.heads.group
        m0 = tile * 2 * ROWS
        bounds = sequence_bounds(Range, b, visibility, RANGE)
        lo, hi = tile_keys(Range, b, m0, bounds, visibility, 128, RANGE, 1)
        begin, count = tile_blocks(bounds.first, lo, hi, num_keys, BN)
        if RANGE == 2:
            # To the end of the last block, whose keys behind `hi` stand in its products too.
            behind = gl.minimum(begin + count * BN, num_keys)
            clean = CleanRows(lo=0, hi=num_keys, any=any_unseen(call, b, begin, behind))
        else:
            clean_lo = gl.maximum(bounds.first, bounds.start - bounds.left)
            clean_hi = gl.minimum(bounds.end, bounds.start + num_queries + bounds.right)
            clean = CleanRows(lo=clean_lo, hi=clean_hi, any=bounds.holes != 0)
        # The copy engine itself gives zeros behind the last key.
        dirty_from = gl.where(clean.hi < num_keys, clean.hi, FAR)
        # Late, as in the forward, and behind the load of the queries: see `hand_out`.
        ask_at = gl.where(m0 + 128 <= num_queries, gl.maximum(count - ASK_BLOCKS, 0), 0)
        for j in range(count):
            n = begin + j * BN
            stage = use % STAGES
            phase = use // STAGES & 1
            dirty = clean.any | (n < clean.lo) | (n + BN > dirty_from)
            mbarrier.wait(barriers.k_empty.index(stage), phase ^ 1)
            if RANGE == 1:
                if clean.any:
                    write_seen_keys(Range, buffers.keep, b, m0, n, clean.lo, clean.hi, visibility, 128, BN, RANGE)
            if RANGE == 2:
                if clean.any:
                    keys = n + gl.arange(0, BN, gl.BlockedLayout([1], [32], [1], [0]))
                    buffers.keep.store(seen_of_span(call, b, keys).to(gl.int32))
            scrubs = load_block(
                descriptors.k, b, kv_head, n, buffers.k.index(stage), barriers.k_full.index(stage), scrubs, dirty,
                clean, call, BN, C.d,
            )  # fmt: skip
            if j == 0:  # behind the first keys, which need not wait for the tile before
                for c in gl.static_range(2):
                    mbarrier.wait(barriers.q_empty.index(c), (tiles_done & 1) ^ 1)
                    q_full = barriers.q_full.index(c)
                    mbarrier.expect(q_full, ROWS * (C.d + C.dv) * 2)
                    tma_load(descriptors.q, [b, h, m0 + c * ROWS, 0], q_full, buffers.q.index(c))
                    tma_load(descriptors.g, [b, h, m0 + c * ROWS, 0], q_full, buffers.g.index(c))
            mbarrier.wait(barriers.v_empty.index(stage), phase ^ 1)
            scrubs = load_block(
                descriptors.v, b, kv_head, n, buffers.v.index(stage), barriers.v_full.index(stage), scrubs, dirty,
                clean, call, BN, C.dv,
            )  # fmt: skip
            use += 1
            if j == ask_at:
                mbarrier.arrive(call.queue.asked, count=1)
        b, h, tile = next_position(call.queue, tiles_done, 1)
        tiles_done += 1


_NOT_SPECIALIZED = [
    "num_heads", "group", "num_queries", "num_keys", "query_start", "window_left", "window_right", "stride_rb",
    "stride_rs", "stride_b", "stride_h", "stride_s", "eights", "all_heads", "tiles_per_head", "section",
    "drop_below",
]  # fmt: skip


@gluon.jit(do_not_specialize=_NOT_SPECIALIZED)
def flashcore_hopper_backward_dq(
    q_desc,
    g_desc,
    k_desc,
    v_desc,
    Rows,
    Range,
    Spans,
    GradQuery,
    Counter,
    places,
    of_delta,
    num_heads,
    group,
    num_queries,
    num_keys,
    query_start,
    window_left,
    window_right,
    stride_rb,
    stride_rs,
    stride_b,
    stride_h,
    stride_s,
    eights,
    query_scale,
    score_scale,
    cap_scale,
    all_heads,
    tiles_per_head,
    section,
    drop_below,
    C: gl.constexpr,
):
    """dQ = scale dS K over the keys that each query sees.

    Shapes: descriptors of Q `[B, H, Q, D]` and dO `[B, H, Q, Dv]` in blocks of 64 rows, of K and V in blocks of
    `C.block_n`; Rows fp32 `[2 or 4, B * H, places]` as `preprocess` leaves it, `of_delta` elements between its parts;
    Range a KeyRange; with a line a query Spans int32 `[B, spans, 8]`, see spans.py; GradQuery `[B, H, Q, D]` with
    strides and columns in units of 8 elements; Counter an int32 that is 0, and 0 again at the end.
    Grid: as many programs as run at once, or as there are tiles.
    """
    BN: gl.constexpr = C.block_n
    STAGES: gl.constexpr = C.stages
    dtype: gl.constexpr = q_desc.dtype
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    if C.range_layout == 0:
        Range = num_keys
    if C.range_layout != 2:
        Spans = num_keys
    q_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, C.d], q_desc.layout)
    g_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, C.dv], g_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, C.d], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, C.dv], v_desc.layout)
    keep_smem = gl.allocate_shared_memory(gl.int32, [BN], PLAIN)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    raw = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    positions = gl.allocate_shared_memory(gl.int32, [6, 1], PLAIN)
    position_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    position_asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=256)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=256)
    for c in gl.static_range(2):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=128)
        mbarrier.init(position_full.index(c), count=1)
    mbarrier.init(raw, count=1)
    mbarrier.init(position_asked, count=1)
    fence_async_shared()
    queue = Queue(positions=positions, full=position_full, asked=position_asked, counter=Counter)
    pointers = DqPointers(
        rows=Rows, key_range=Range, spans=Spans, grad_query=GradQuery, places=places, of_delta=of_delta,
        query_strides=GradientStrides(stride_b=stride_b, stride_h=stride_h, stride_s=stride_s, eights=eights),
    )  # fmt: skip
    call = Call(
        descriptors=Descriptors(q=q_desc, g=g_desc, k=k_desc, v=v_desc),
        buffers=DqBuffers(q=q_smem, g=g_smem, k=k_smem, v=v_smem, keep=keep_smem),
        barriers=DqBarriers(
            q_full=q_full, q_empty=q_empty, k_full=k_full, k_empty=k_empty, v_full=v_full, v_empty=v_empty, raw=raw
        ),
        queue=queue,
        pointers=pointers,
        grad_scale=query_scale,
        value_scale=query_scale,
        drop_below=drop_below,
        heads=Heads(num_heads=num_heads, group=group),
        visibility=Visibility(
            num_queries=num_queries, num_keys=num_keys, query_start=query_start, window_left=window_left,
            window_right=window_right, stride_rb=stride_rb, stride_rs=stride_rs,
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

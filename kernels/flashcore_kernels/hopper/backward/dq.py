"""dQ: two consumer warpgroups keep 64 queries each, and the keys that they see stream past.

    S = Q K^T, P = exp(S - lse), dP = dO V^T, dS = P * (dP - delta), dQ += dS K, and is multiplied by scale in the end

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

from ..consumer import _leave_blocks
from ..consumer import _release as release
from ..consumer import _tile as tile_of
from ..producer import _scrub as scrub
from ..producer import _seen_columns as seen_columns
from ..schedule import hand_out, place_of, taken_over
from ..triton_api import SHARED_WORKER_ARGUMENTS, barrier, tma_load
from ..visible import FAR, sequence_bounds, tile_blocks, tile_keys
from .masks import keep_keys, query_shift
from .products import as_operand, capped, product
from .store import store_layouts, store_rows

# With how many blocks left to fetch a program asks for its next tile.
ASK_BLOCKS = gl.constexpr(4)
ROWS = gl.constexpr(64)


@dataclass(frozen=True)
class DqConfig:
    """Everything that one compiled kernel is made for.

    Attributes:
        d, dv: columns of the tiles of Q and K, and of dO and V: powers of two.
        block_n: keys of a block.
        stages: blocks of K and V in shared memory.
        query_block: queries of a block of `dkdv`, on whose grid lse and delta lie.
        range_layout: 0 no KeyRange, 1 a line a sequence.
        softcap: whether there is any.
        consumer_registers, producer_registers: of a thread.
    """

    d: int
    dv: int
    block_n: int
    stages: int
    query_block: int
    range_layout: int
    softcap: bool
    consumer_registers: int
    producer_registers: int

    # What the forward's functions ask a configuration for.
    consumers = 2
    rows = 64
    warps = 4

    @property
    def layouts(self) -> tuple:
        """Of dQ, see `store_layouts`."""
        return store_layouts(self.d)


@gluon.jit
def _row_numbers(tile, pointers, numbers, scales, C: gl.constexpr):
    """log2 units of -lse, -inf for rows that saw no key, and -delta, of a consumer's queries `[64]`."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.block_n, 16]))
    Rows, Range, GradQuery, places, of_delta, strides, query_scale = pointers
    num_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rs = numbers
    b, h, bh, r0, begin, count, mine, left_edge, right_edge, row_lo, row_hi, holes = tile
    rows = r0 + gl.arange(0, ROWS, LAYOUT)
    shift = query_shift(sequence_bounds(Range, b, numbers, C.range_layout), C.query_block)
    at = Rows + bh.to(gl.int64) * places + shift + rows
    lse = gl.load(at, mask=rows < num_queries, other=float("-inf"))
    if not C.softcap:
        lse = lse * scales[0]
    return lse, gl.load(at + of_delta, mask=rows < num_queries, other=0.0)


@gluon.jit
def _step(dq, use, n, edge, q, g, lse, delta, smem, bars, masking, scales, C: gl.constexpr):
    """One block of keys: its part of dQ."""
    BN: gl.constexpr = C.block_n
    D: gl.constexpr = C.d
    DV: gl.constexpr = C.dv
    q_smem, g_smem, k_smem, v_smem, keep_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, raw = bars
    score_scale, cap_scale, all_heads, tiles_per_head, section = scales
    row_lo, row_hi, line, holes, num_keys = masking
    stage = use % C.stages
    phase = use // C.stages & 1
    k = k_smem.index(stage).reshape([BN, D])
    v = v_smem.index(stage).reshape([BN, DV])
    mbarrier.wait(k_full.index(stage), phase)
    s = product(q, k, BN)
    mbarrier.wait(v_full.index(stage), phase)
    dp = product(g, v, BN)
    s = warpgroup_mma_wait(1, deps=[s])
    if C.softcap:
        s, slope = capped(s, score_scale)
        x = gl.fma(s, gl.full_like(s, 0.0) + cap_scale, gl.full_like(s, 0.0) + lse[:, None])
    else:
        x = gl.fma(s, gl.full_like(s, 0.0) + score_scale, gl.full_like(s, 0.0) + lse[:, None])
    p = gl.exp2(x)
    if edge:
        p = keep_keys(p, n, row_lo, row_hi, line, holes, num_keys, C.range_layout)
    if C.softcap:
        p = p * slope
    dp = warpgroup_mma_wait(0, deps=[dp])
    release(v_empty.index(stage))
    ds = as_operand(p * (dp + delta[:, None]), q_smem.dtype, D)
    dq = warpgroup_mma(ds, k, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[dq])
    release(k_empty.index(stage))
    return dq


@gluon.jit
def _consume(CONSUMER: gl.constexpr, descs, smem, bars, queue, pointers, numbers, scales, C: gl.constexpr):
    """A consumer: its queries of each tile, one tile after the other."""
    BN: gl.constexpr = C.block_n
    D: gl.constexpr = C.d
    DV: gl.constexpr = C.dv
    LAYOUTS: gl.constexpr = C.layouts
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q_smem, g_smem, k_smem, v_smem, keep_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, raw = bars
    Rows, Range, GradQuery, places, of_delta, strides, query_scale = pointers
    num_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rs = numbers
    stride_b, stride_h, stride_s, eights = strides
    q = q_smem.index(CONSUMER).reshape([ROWS, D])
    g = g_smem.index(CONSUMER).reshape([ROWS, DV])
    place = place_of(gl.program_id(0), num_heads, scales)
    tile = tile_of(place, (Rows, Range, Rows), numbers, scales, CONSUMER, C)
    lse, delta = _row_numbers(tile, pointers, numbers, scales, C)
    turn = 0
    use = 0
    while place[2] >= 0:
        b, h, bh, r0, begin, count, mine, left_edge, right_edge, row_lo, row_hi, holes = tile
        line = Range
        if C.range_layout == 1:
            line = Range + b.to(gl.int64) * stride_rb
        masking = (row_lo, row_hi, line, holes, num_keys)
        dq = gl.zeros([ROWS, D], gl.float32, DQ_LAYOUT)
        mbarrier.wait(q_full.index(CONSUMER), turn & 1)
        for j in range(mine):
            edge = (j < left_edge) | (j >= right_edge)
            dq = _step(dq, use, begin + j * BN, edge, q, g, lse, delta, smem, bars, masking, scales, C)
            use += 1
        use = _leave_blocks(use, tile, bars, C)
        release(q_empty.index(CONSUMER))
        place = taken_over(queue, turn, 4)
        head = GradQuery + b.to(gl.int64) * (stride_b * 8) + h.to(gl.int64) * (stride_h * 8)
        keep = lse != float("-inf")
        store_rows(head, dq * query_scale, keep, r0, num_queries, stride_s, eights, q_smem.dtype, LAYOUTS)
        tile = tile_of(place, (Rows, Range, Rows), numbers, scales, CONSUMER, C)
        lse, delta = _row_numbers(tile, pointers, numbers, scales, C)
        turn += 1


@gluon.jit
def _consumer_0(descs, smem, bars, queue, pointers, numbers, scales, C: gl.constexpr):
    _consume(0, descs, smem, bars, queue, pointers, numbers, scales, C)


@gluon.jit
def _consumer_1(descs, smem, bars, queue, pointers, numbers, scales, C: gl.constexpr):
    _consume(1, descs, smem, bars, queue, pointers, numbers, scales, C)


@gluon.jit
def _load_block(desc, place, smem, full, raw, raws, dirty, any_key, keep_smem, n, lo, hi, BN: gl.constexpr,
                COLUMNS: gl.constexpr):  # fmt: skip
    """Copy a block of keys or values `[BN, COLUMNS]`, and zero those that nobody sees before saying that it is full."""
    b, kv_head = place
    if dirty:
        mbarrier.expect(raw, BN * COLUMNS * 2)
        tma_load(desc, [b, kv_head, n, 0], raw, smem)
        mbarrier.wait(raw, raws & 1)
        scrub(smem.reshape([BN, COLUMNS]), keep_smem, n, lo, hi, any_key, BN, COLUMNS)
        fence_async_shared()
        barrier()
        mbarrier.arrive(full, count=1)
    else:
        mbarrier.expect(full, BN * COLUMNS * 2)
        tma_load(desc, [b, kv_head, n, 0], full, smem)
    return raws + dirty.to(gl.int32)


@gluon.jit
def _produce(descs, smem, bars, queue, pointers, numbers, scales, C: gl.constexpr):
    """The producer warp: copies Q and dO once a tile, K and V block by block, ahead of the consumers."""
    BN: gl.constexpr = C.block_n
    STAGES: gl.constexpr = C.stages
    RANGE: gl.constexpr = C.range_layout
    q_desc, g_desc, k_desc, v_desc = descs
    q_smem, g_smem, k_smem, v_smem, keep_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, raw = bars
    Rows, Range, GradQuery, places, of_delta, strides, query_scale = pointers
    num_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rs = numbers
    place_smem, place_full, place_asked, Counter = queue
    b, h, tile = place_of(gl.program_id(0), num_heads, scales)
    turn = 0
    use = 0
    raws = 0
    while tile >= 0:
        kv_head = h // group
        m0 = tile * 2 * ROWS
        sequence = sequence_bounds(Range, b, numbers, RANGE)
        first, end, start, left, right, holes = sequence
        lo, hi = tile_keys(Range, b, m0, sequence, numbers, 128, RANGE, 1)
        begin, count = tile_blocks(first, lo, hi, num_keys, BN)
        # Keys outside of [clean_lo, clean_hi) may be NaN. The copy engine itself gives zeros behind the last one.
        clean_lo = gl.maximum(first, start - left)
        clean_hi = gl.minimum(end, start + num_queries + right)
        any_key = holes != 0
        dirty_from = gl.where(clean_hi < num_keys, clean_hi, FAR)
        # Late, as in the forward, and behind the load of the queries: see `hand_out`.
        ask_at = gl.where(m0 + 128 <= num_queries, gl.maximum(count - ASK_BLOCKS, 0), 0)
        for j in range(count):
            n = begin + j * BN
            stage = use % STAGES
            phase = use // STAGES & 1
            dirty = any_key | (n < clean_lo) | (n + BN > dirty_from)
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            if RANGE > 0:
                if any_key:
                    seen_columns(Range, keep_smem, b, m0, n, clean_lo, clean_hi, holes, numbers, 128, BN, RANGE)
            raws = _load_block(
                k_desc, (b, kv_head), k_smem.index(stage), k_full.index(stage), raw, raws, dirty, any_key, keep_smem, n,
                clean_lo, clean_hi, BN, C.d,
            )  # fmt: skip
            if j == 0:  # behind the first keys, which need not wait for the tile before
                for c in gl.static_range(2):
                    mbarrier.wait(q_empty.index(c), (turn & 1) ^ 1)
                    mbarrier.expect(q_full.index(c), ROWS * (C.d + C.dv) * 2)
                    tma_load(q_desc, [b, h, m0 + c * ROWS, 0], q_full.index(c), q_smem.index(c))
                    tma_load(g_desc, [b, h, m0 + c * ROWS, 0], q_full.index(c), g_smem.index(c))
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            raws = _load_block(
                v_desc, (b, kv_head), v_smem.index(stage), v_full.index(stage), raw, raws, dirty, any_key, keep_smem, n,
                clean_lo, clean_hi, BN, C.dv,
            )  # fmt: skip
            use += 1
            if j == ask_at:
                mbarrier.arrive(place_asked, count=1)
        b, h, tile = taken_over(queue, turn, 1)
        turn += 1


_NOT_SPECIALIZED = [
    "num_heads", "group", "num_queries", "num_keys", "query_start", "window_left", "window_right", "stride_rb",
    "stride_b", "stride_h", "stride_s", "eights", "all_heads", "tiles_per_head", "section",
]  # fmt: skip


@gluon.jit(do_not_specialize=_NOT_SPECIALIZED)
def flashcore_backward_dq(
    q_desc,
    g_desc,
    k_desc,
    v_desc,
    Rows,
    Range,
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
    C: gl.constexpr,
):
    """dQ = scale dS K over the keys that each query sees.

    Shapes: descriptors of Q `[B, H, Q, D]` and dO `[B, H, Q, Dv]` in blocks of 64 rows, of K and V in blocks of
    `C.block_n`; Rows fp32 `[2, B * H, places]` as `preprocess` leaves it, `of_delta` elements between its halves; Range
    a KeyRange; GradQuery `[B, H, Q, D]` with strides and columns in units of 8 elements; Counter an int32 that is 0,
    and 0 again at the end.
    Grid: as many programs as run at once, or as there are tiles.
    """
    BN: gl.constexpr = C.block_n
    STAGES: gl.constexpr = C.stages
    dtype: gl.constexpr = q_desc.dtype
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    if C.range_layout == 0:
        Range = num_keys
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
    place_smem = gl.allocate_shared_memory(gl.int32, [6, 1], PLAIN)
    place_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    place_asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=256)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=256)
    for c in gl.static_range(2):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=128)
        mbarrier.init(place_full.index(c), count=1)
    mbarrier.init(raw, count=1)
    mbarrier.init(place_asked, count=1)
    fence_async_shared()
    descs = (q_desc, g_desc, k_desc, v_desc)
    smem = (q_smem, g_smem, k_smem, v_smem, keep_smem)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, raw)
    queue = (place_smem, place_full, place_asked, Counter)
    pointers = (Rows, Range, GradQuery, places, of_delta, (stride_b, stride_h, stride_s, eights), query_scale)
    numbers = (
        num_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rb,
    )  # fmt: skip
    scales = (score_scale, cap_scale, all_heads, tiles_per_head, section)
    # The argument tuples stand in the calls: under a name their constexprs would become tensors.
    if SHARED_WORKER_ARGUMENTS:
        gl.warp_specialize(
            (descs, smem, bars, queue, pointers, numbers, scales, C), _consumer_0,
            (descs, smem, bars, queue, pointers, numbers, scales, C), [_consumer_1, _produce, hand_out],
            [4, 1, 1], [C.consumer_registers, C.producer_registers, C.producer_registers],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer_0, (descs, smem, bars, queue, pointers, numbers, scales, C)),
                (_consumer_1, (descs, smem, bars, queue, pointers, numbers, scales, C)),
                (_produce, (descs, smem, bars, queue, pointers, numbers, scales, C)),
                (hand_out, (descs, smem, bars, queue, pointers, numbers, scales, C)),
            ],
            [4, 1, 1], [C.consumer_registers, C.producer_registers, C.producer_registers],
        )  # fmt: skip

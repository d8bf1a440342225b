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

from ..consumer import _release as release
from ..schedule import hand_out, place_of, taken_over
from ..triton_api import SHARED_WORKER_ARGUMENTS, copy_async, tma_load
from ..visible import sequence_bounds
from .masks import first_key, keep_queries, query_blocks, query_shift, seen_keys, whole_blocks
from .products import as_operand, capped, product, product_onto, started_at
from .store import store_layouts, store_rows

# With how many blocks left to fetch a program asks for its next tile.
ASK_BLOCKS = gl.constexpr(4)
# Keys of a consumer, and of a tile.
KEYS = gl.constexpr(64)
BLOCK_N = gl.constexpr(128)


@dataclass(frozen=True)
class DkdvConfig:
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
def _tile(place, Range, numbers, tiles_per_head, C: gl.constexpr):
    """The tile at this place: (sequence, KV head, its first key, blocks of queries [begin, end), bounds)."""
    num_queries = numbers[2]
    b, kv_head, number = place
    sequence = sequence_bounds(Range, b, numbers, C.range_layout)
    # The keys that most queries see first, under causal attention: `place_of` numbers the other way round.
    n0 = first_key(sequence, tiles_per_head - 1 - gl.maximum(number, 0), BLOCK_N)
    begin, end = query_blocks(sequence, n0, num_queries, C.block_m, BLOCK_N)
    return b, kv_head, n0, begin, end, sequence


@gluon.jit
def _pass_blocks(count, use, bars, C: gl.constexpr):
    """Pass over blocks that only the other consumer sees. Not before they are full: it would count for older ones."""
    q_full, q_empty, g_full, g_empty, kv_full, kv_empty = bars
    for _ in range(count):
        mbarrier.wait(q_full.index(use % C.query_stages), use // C.query_stages & 1)
        release(q_empty.index(use % C.query_stages))
        mbarrier.wait(g_full.index(use % C.grad_stages), use // C.grad_stages & 1)
        release(g_empty.index(use % C.grad_stages))
        use += 1
    return use


@gluon.jit
def _step(state, use, m, edge, k, v, k0, sequence, smem, bars, scales, C: gl.constexpr):
    """One block of queries: its part of dK and dV."""
    BM: gl.constexpr = C.block_m
    D: gl.constexpr = C.d
    DV: gl.constexpr = C.dv
    dk, dv = state
    q_smem, g_smem, k_smem, v_smem, lse_smem, delta_smem = smem
    q_full, q_empty, g_full, g_empty, kv_full, kv_empty = bars
    score_scale, cap_scale, all_heads, tiles_per_head, section = scales
    dtype: gl.constexpr = q_smem.dtype
    q_stage = use % C.query_stages
    g_stage = use % C.grad_stages
    q = q_smem.index(q_stage).reshape([BM, D])
    g = g_smem.index(g_stage).reshape([BM, DV])
    mbarrier.wait(q_full.index(q_stage), use // C.query_stages & 1)
    if C.softcap:
        # tanh wants the scores by themselves, and has no registers beside dP.
        s = warpgroup_mma_wait(0, deps=[product(k, q, BM)])
        t, slope = capped(s, score_scale)
        lse = lse_smem.index(q_stage).load(gl.SliceLayout(0, s.type.layout))
        x = gl.fma(t, gl.full_like(t, 0.0) + cap_scale, gl.full_like(t, 0.0) + lse[None, :])
        mbarrier.wait(g_full.index(g_stage), use // C.grad_stages & 1)
        dp = product_onto(v, g, started_at(delta_smem.index(g_stage), BM))
        p = gl.exp2(x)
    else:
        # Both before either product: ptxas lets no register be written to start one while another is under way.
        s = started_at(lse_smem.index(q_stage), BM)
        mbarrier.wait(g_full.index(g_stage), use // C.grad_stages & 1)
        dp = started_at(delta_smem.index(g_stage), BM)
        s = product_onto(k, q, s)
        dp = product_onto(v, g, dp)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * score_scale)
    if edge:
        p = keep_queries(p, sequence, k0, m)
    dv = warpgroup_mma(as_operand(p, dtype, DV), g, dv, is_async=True)
    if C.softcap:
        p = p * slope
    dp = warpgroup_mma_wait(1, deps=[dp])
    dk = warpgroup_mma(as_operand(p * dp, dtype, D), q, dk, is_async=True)
    dv = warpgroup_mma_wait(1, deps=[dv])
    release(g_empty.index(g_stage))
    dk = warpgroup_mma_wait(0, deps=[dk])
    release(q_empty.index(q_stage))
    return dk, dv


@gluon.jit
def _consume(CONSUMER: gl.constexpr, descs, smem, bars, queue, pointers, numbers, scales, C: gl.constexpr):
    """A consumer: its keys of each tile, one tile after the other."""
    BM: gl.constexpr = C.block_m
    D: gl.constexpr = C.d
    DV: gl.constexpr = C.dv
    KEY_LAYOUTS: gl.constexpr = C.key_layouts
    VALUE_LAYOUTS: gl.constexpr = C.value_layouts
    q_smem, g_smem, k_smem, v_smem, lse_smem, delta_smem = smem
    q_full, q_empty, g_full, g_empty, kv_full, kv_empty = bars
    Rows, Range, GradKey, GradValue, places, of_delta, strides, key_scale = pointers
    num_kv_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rs = numbers
    score_scale, cap_scale, all_heads, tiles_per_head, section = scales
    stride_kb, stride_kh, stride_ks, key_eights, stride_vb, stride_vh, stride_vs, value_eights = strides
    dtype: gl.constexpr = q_smem.dtype
    DK_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    k = k_smem.index(CONSUMER).reshape([KEYS, D])
    v = v_smem.index(CONSUMER).reshape([KEYS, DV])
    place = place_of(gl.program_id(0), num_kv_heads, scales)
    turn = 0
    use = 0
    while place[2] >= 0:
        b, kv_head, n0, begin, end, sequence = _tile(place, Range, numbers, tiles_per_head, C)
        k0 = n0 + CONSUMER * KEYS
        shift = query_shift(sequence, BM)
        my_begin, my_end = query_blocks(sequence, k0, num_queries, BM, KEYS)
        whole_begin, whole_end = whole_blocks(sequence, k0, BM, KEYS)
        my_begin = gl.where(my_begin < my_end, my_begin, begin)
        my_end = gl.maximum(my_begin, my_end)
        dk = gl.zeros([KEYS, D], gl.float32, DK_LAYOUT)
        dv = gl.zeros([KEYS, DV], gl.float32, DV_LAYOUT)
        state = (dk, dv)
        mbarrier.wait(kv_full.index(CONSUMER), turn & 1)
        for _ in range(group):
            use = _pass_blocks(my_begin - begin, use, bars, C)
            for i in range(my_begin, my_end):
                m = i * BM - shift
                edge = (i < whole_begin) | (i >= whole_end)
                state = _step(state, use, m, edge, k, v, k0, sequence, smem, bars, scales, C)
                use += 1
            use = _pass_blocks(end - my_end, use, bars, C)
        dk, dv = state
        release(kv_empty.index(CONSUMER))
        keys = k0 + gl.arange(0, KEYS, gl.SliceLayout(1, DK_LAYOUT))
        line = Range
        if C.range_layout == 1:
            line = Range + b.to(gl.int64) * stride_rb
        keep = seen_keys(sequence, line, keys, num_queries, num_keys, C.range_layout)
        head = GradKey + b.to(gl.int64) * (stride_kb * 8) + kv_head.to(gl.int64) * (stride_kh * 8)
        store_rows(head, dk * key_scale, keep, k0, num_keys, stride_ks, key_eights, dtype, KEY_LAYOUTS)
        head = GradValue + b.to(gl.int64) * (stride_vb * 8) + kv_head.to(gl.int64) * (stride_vh * 8)
        store_rows(head, dv, keep, k0, num_keys, stride_vs, value_eights, dtype, VALUE_LAYOUTS)
        place = taken_over(queue, turn, 4)
        turn += 1


@gluon.jit
def _consumer_0(descs, smem, bars, queue, pointers, numbers, scales, C: gl.constexpr):
    _consume(0, descs, smem, bars, queue, pointers, numbers, scales, C)


@gluon.jit
def _consumer_1(descs, smem, bars, queue, pointers, numbers, scales, C: gl.constexpr):
    _consume(1, descs, smem, bars, queue, pointers, numbers, scales, C)


@gluon.jit
def _copy_rows(smem, row, full, BM: gl.constexpr):
    """Copy a number of each query `[BM]`; `full` counts one arrival of each thread."""
    copy_async(smem, row + gl.arange(0, BM, gl.BlockedLayout([BM // 32], [32], [1], [0])))
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def _load_keys(descs, smem, bars, b, kv_head, n0, turn, C: gl.constexpr):
    """Copy a tile's keys and values, each consumer's when it has done with those before."""
    q_desc, g_desc, k_desc, v_desc = descs
    q_smem, g_smem, k_smem, v_smem, lse_smem, delta_smem = smem
    q_full, q_empty, g_full, g_empty, kv_full, kv_empty = bars
    for c in gl.static_range(2):
        mbarrier.wait(kv_empty.index(c), (turn & 1) ^ 1)
        mbarrier.expect(kv_full.index(c), KEYS * (C.d + C.dv) * 2)
        tma_load(k_desc, [b, kv_head, n0 + c * KEYS, 0], kv_full.index(c), k_smem.index(c))
        tma_load(v_desc, [b, kv_head, n0 + c * KEYS, 0], kv_full.index(c), v_smem.index(c))


@gluon.jit
def _produce(descs, smem, bars, queue, pointers, numbers, scales, C: gl.constexpr):
    """The producer warp: copies K and V once a tile, Q and dO block by block, ahead of the consumers.

    It asks for the next tile when this one's keys were loaded: then each thread of the consumers has read the place
    that the next one overwrites (see `hand_out`). So it loads them for tiles that no query sees too.
    """
    BM: gl.constexpr = C.block_m
    QS: gl.constexpr = C.query_stages
    GS: gl.constexpr = C.grad_stages
    q_desc, g_desc, k_desc, v_desc = descs
    q_smem, g_smem, k_smem, v_smem, lse_smem, delta_smem = smem
    q_full, q_empty, g_full, g_empty, kv_full, kv_empty = bars
    Rows, Range, GradKey, GradValue, places, of_delta, strides, key_scale = pointers
    place_smem, place_full, place_asked, Counter = queue
    num_kv_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rs = numbers
    score_scale, cap_scale, all_heads, tiles_per_head, section = scales
    place = place_of(gl.program_id(0), num_kv_heads, scales)
    turn = 0
    use = 0
    while place[2] >= 0:
        b, kv_head, n0, begin, end, sequence = _tile(place, Range, numbers, tiles_per_head, C)
        shift = query_shift(sequence, BM)
        ask_at = gl.maximum((end - begin) * group - ASK_BLOCKS, 0)
        if begin == end:
            _load_keys(descs, smem, bars, b, kv_head, n0, turn, C)
            mbarrier.arrive(place_asked, count=1)
        done = 0
        for g in range(group):
            h = kv_head * group + g
            head = Rows + (b * num_kv_heads * group + h).to(gl.int64) * places
            for i in range(begin, end):
                q_stage = use % QS
                g_stage = use % GS
                mbarrier.wait(q_empty.index(q_stage), (use // QS & 1) ^ 1)
                mbarrier.expect(q_full.index(q_stage), BM * C.d * 2)
                tma_load(q_desc, [b, h, i * BM - shift, 0], q_full.index(q_stage), q_smem.index(q_stage))
                _copy_rows(lse_smem.index(q_stage), head + i * BM, q_full.index(q_stage), BM)
                mbarrier.wait(g_empty.index(g_stage), (use // GS & 1) ^ 1)
                mbarrier.expect(g_full.index(g_stage), BM * C.dv * 2)
                tma_load(g_desc, [b, h, i * BM - shift, 0], g_full.index(g_stage), g_smem.index(g_stage))
                _copy_rows(delta_smem.index(g_stage), head + of_delta + i * BM, g_full.index(g_stage), BM)
                use += 1
                if done == 0:  # behind the first queries, which need not wait for the tile before
                    _load_keys(descs, smem, bars, b, kv_head, n0, turn, C)
                if done == ask_at:
                    mbarrier.arrive(place_asked, count=1)
                done += 1
        place = taken_over(queue, turn, 1)
        turn += 1


_NOT_SPECIALIZED = [
    "num_kv_heads", "group", "num_queries", "num_keys", "query_start", "window_left", "window_right", "stride_rb",
    "stride_kb", "stride_kh", "stride_ks", "key_eights", "stride_vb", "stride_vh", "stride_vs", "value_eights",
    "all_heads", "tiles_per_head", "section",
]  # fmt: skip


@gluon.jit(do_not_specialize=_NOT_SPECIALIZED)
def flashcore_backward_dkdv(
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
    place_smem = gl.allocate_shared_memory(gl.int32, [6, 1], PLAIN)
    place_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    place_asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
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
        mbarrier.init(place_full.index(c), count=1)
    mbarrier.init(place_asked, count=1)
    fence_async_shared()
    descs = (q_desc, g_desc, k_desc, v_desc)
    smem = (q_smem, g_smem, k_smem, v_smem, lse_smem, delta_smem)
    bars = (q_full, q_empty, g_full, g_empty, kv_full, kv_empty)
    queue = (place_smem, place_full, place_asked, Counter)
    strides = (stride_kb, stride_kh, stride_ks, key_eights, stride_vb, stride_vh, stride_vs, value_eights)
    pointers = (Rows, Range, GradKey, GradValue, places, of_delta, strides, key_scale)
    numbers = (
        num_kv_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rb,
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

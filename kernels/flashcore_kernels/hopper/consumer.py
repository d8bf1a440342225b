"""A consumer warpgroup: scores, softmax and output of 64 queries."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .schedule import tile_at, tiles_of_program
from .triton_api import ROUND_LATE, barrier, tma_store
from .visible import BITMAP, row_ranges, sequence_bounds, tile_blocks, tile_keys

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def tanh(x):
    """tanh, exact to fp32 rounding: a series near 0, where 1 - exp(-2|x|) would cancel."""
    t = gl.exp2(-2.8853900817779268 * gl.abs(x))  # exp(-2|x|)
    big = (1.0 - t) / (1.0 + t)
    big = gl.where(x < 0, -big, big)
    x2 = x * x
    # Taylor to x^11; at |x| = 0.3 the next term is below fp32 rounding.
    series = -0.008863235529902197
    series = series * x2 + 0.021869488536155203
    series = series * x2 - 0.05396825396825397
    series = series * x2 + 0.13333333333333333
    series = series * x2 - 0.3333333333333333
    return gl.where(gl.abs(x) < 0.3, x + x * x2 * series, big)


@gluon.jit
def _named_barrier(ASM: gl.constexpr):
    """A hardware barrier among the two consumers, 256 threads; Triton's own use numbers 0 to 4."""
    gl.inline_asm_elementwise(
        ASM, "=r,r", [gl.full([128], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0]))],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _my_turn(CONSUMER: gl.constexpr):
    if CONSUMER == 0:
        _named_barrier("bar.sync 9, 256; mov.b32 $0, $1;")
    else:
        _named_barrier("bar.sync 10, 256; mov.b32 $0, $1;")


@gluon.jit
def _your_turn(CONSUMER: gl.constexpr):
    if CONSUMER == 0:
        _named_barrier("bar.arrive 10, 256; mov.b32 $0, $1;")
    else:
        _named_barrier("bar.arrive 9, 256; mov.b32 $0, $1;")


@gluon.jit
def _hide(s, n, row_lo, row_hi, bitmap, holes, num_keys, SIDES: gl.constexpr, RANGE: gl.constexpr):
    """-inf where a row does not see a key. SIDES 1: the block begins at or after every row's first key."""
    BN: gl.constexpr = s.shape[1]
    cols = n + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
    if SIDES == 1:
        s = gl.where(cols[None, :] < row_hi[:, None], s, float("-inf"))
    else:
        s = gl.where((cols[None, :] >= row_lo[:, None]) & (cols[None, :] < row_hi[:, None]), s, float("-inf"))
        if RANGE == 1:
            if holes != 0:
                word = gl.load(bitmap + (cols >> 5), mask=cols < num_keys, other=0)
                s = gl.where((((word >> (cols & 31)) & 1) == 1)[None, :], s, float("-inf"))
    return s


@gluon.jit
def _softmax(s, m, l, unit, CHECK: gl.constexpr):
    """Fold the scores s * unit (log2 units) into (m, l); returns the probabilities and what older sums shrink by."""
    m_new = gl.maximum(m, gl.max(s, axis=1) * unit)
    m_finite = m_new
    if CHECK:
        # A row that has seen no key yet has m = -inf, and -inf - -inf is NaN.
        m_finite = gl.where(m_new == float("-inf"), 0.0, m_new)
    # An explicit fma, so that checked and unchecked blocks round alike.
    p = gl.exp2(gl.fma(s, gl.full_like(s, 0.0) + unit, gl.full_like(s, 0.0) - m_finite[:, None]))
    alpha = gl.exp2(m - m_finite)
    l = gl.fma(l, alpha, gl.sum(p, axis=1))
    return p, m_new, l, alpha


@gluon.jit
def _scores(q0, q1, k0_smem, k1_smem, stage, C: gl.constexpr):
    """Issue S = Q K^T for the block in `stage`."""
    D0: gl.constexpr = C.d0
    D1: gl.constexpr = C.d1
    BN: gl.constexpr = C.block_n
    zero = gl.zeros([64, BN], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16]))
    k0 = k0_smem.index(stage).reshape([BN, D0])  # [N, D0]
    s = warpgroup_mma(q0, k0.permute((1, 0)), zero, use_acc=False, is_async=True)
    if D1 > 0:
        k1 = k1_smem.index(stage).reshape([BN, D1])  # [N, D1]
        s = warpgroup_mma(q1, k1.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _add_values(p, v0_smem, v1_smem, stage, acc0, acc1, C: gl.constexpr):
    """Issue acc += P V for the block in `stage`."""
    DV0: gl.constexpr = C.dv0
    DV1: gl.constexpr = C.dv1
    BN: gl.constexpr = C.block_n
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV0, 16])
    p = gl.convert_layout(p.to(v0_smem.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
    acc0 = warpgroup_mma(p, v0_smem.index(stage).reshape([BN, DV0]), acc0, is_async=True)
    if DV1 > 0:
        acc1 = warpgroup_mma(p, v1_smem.index(stage).reshape([BN, DV1]), acc1, is_async=True)
    return acc0, acc1


@gluon.jit
def _step(state, use, n, q0, q1, smem, bars, masking, unit_cap,
          CONSUMER: gl.constexpr, CHECK: gl.constexpr, C: gl.constexpr):  # fmt: skip
    """One block: scores and softmax, and the product with V of the block before."""
    DV0: gl.constexpr = C.dv0
    DV1: gl.constexpr = C.dv1
    STAGES: gl.constexpr = C.stages
    RANGE: gl.constexpr = C.range_layout
    SOFTCAP: gl.constexpr = C.softcap
    PING_PONG: gl.constexpr = C.ping_pong
    acc0, acc1, p, m, l = state
    q0_smem, q1_smem, k0_smem, k1_smem, v0_smem, v1_smem, o0_smem, o1_smem, keep_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw = bars
    row_lo, row_hi, bitmap, holes, num_keys = masking
    score_scale, unit = unit_cap
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV0, 16])
    stage = use % STAGES
    before = (use - 1) % STAGES
    mbarrier.wait(k_full.index(stage), use // STAGES & 1)
    if PING_PONG:
        _my_turn(CONSUMER)
    s_async = _scores(q0, q1, k0_smem, k1_smem, stage, C)
    acc0_async, acc1_async = _add_values(p, v0_smem, v1_smem, before, acc0, acc1, C)
    if PING_PONG:
        _your_turn(CONSUMER)
    s = warpgroup_mma_wait(2 if DV1 > 0 else 1, deps=[s_async])
    if SOFTCAP:
        s = tanh(s * score_scale)
    if CHECK > 0:
        s = _hide(s, n, row_lo, row_hi, bitmap, holes, num_keys, CHECK, RANGE)
    p, m, l, alpha = _softmax(s, m, l, unit, CHECK > 0)
    # The softmax is to run while the product with V does. ptxas would move it behind the wait for that product, but not
    # over a branch, which waiting for the next step's V is; and p among the dependencies stops everything before ptxas.
    mbarrier.wait(v_full.index(stage), use // STAGES & 1)
    if DV1 > 0:
        acc0, acc1, p = warpgroup_mma_wait(0, deps=[acc0_async, acc1_async, p])
    else:
        acc0, p = warpgroup_mma_wait(0, deps=[acc0_async, p])
    mbarrier.arrive(k_empty.index(stage), count=1)
    mbarrier.arrive(v_empty.index(before), count=1)
    acc0 = acc0 * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
    if DV1 > 0:
        O1_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV1, 16])
        acc1 = acc1 * gl.convert_layout(alpha, gl.SliceLayout(1, O1_LAYOUT))[:, None]
    if not ROUND_LATE:
        p = gl.convert_layout(p.to(k0_smem.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
    return acc0, acc1, p, m, l


@gluon.jit
def _tile(turn, pointers, numbers, scales, CONSUMER: gl.constexpr, C: gl.constexpr):
    """This program's tile number `turn`, as one of its consumers sees it.

    Returns (b, h, head of all sequences, first row; first key of the first block, how many blocks the tile visits, how
    many of them this consumer computes; the first `left_edge` of those and those from `right_edge` on with a look at
    each row's range; these ranges; bitmap and holes of the KeyRange).
    """
    Lse, Range, Sinks = pointers
    num_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rs = numbers
    score_scale, cap_scale, all_heads, tiles_per_head, section = scales
    BN: gl.constexpr = C.block_n
    BM: gl.constexpr = 64 * C.consumers
    RANGE: gl.constexpr = C.range_layout
    ROWS_LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16]))
    bh, tile = tile_at(turn, gl.program_id(0), gl.num_programs(0), tiles_per_head, all_heads, section)
    b = bh // num_heads
    h = bh % num_heads
    m0 = tile * BM
    r0 = m0 + CONSUMER * 64
    rows = r0 + gl.arange(0, 64, ROWS_LAYOUT)
    sequence = sequence_bounds(Range, b, numbers, RANGE)
    first, end, start, left, right, holes = sequence
    tile_lo, tile_hi = tile_keys(Range, b, m0, sequence, numbers, BM, RANGE, 4)
    begin, count = tile_blocks(first, tile_lo, tile_hi, num_keys, BN)
    # Keys before hi are seen by some of this consumer's rows, keys [full_lo, full_hi) by all of them.
    if RANGE == 2:
        row_lo, row_hi = row_ranges(Range, b, rows, numbers)
        valid = rows < num_queries
        hi = gl.max(gl.where(valid & (row_lo < row_hi), row_hi, 0), axis=0)
        full_lo = gl.max(gl.where(valid, row_lo, 0), axis=0)
        full_hi = gl.min(gl.where(valid, row_hi, num_keys), axis=0)
    else:
        row_lo = gl.maximum(first, start + rows - left)
        row_hi = gl.minimum(end, start + rows + right + 1)
        last = gl.minimum(r0 + 64, num_queries) - 1
        hi = gl.where(r0 < num_queries, gl.minimum(end, start + last + right + 1), 0)
        full_lo = gl.maximum(first, start + last - left)
        full_hi = gl.minimum(end, start + r0 + right + 1)
    mine = gl.minimum(gl.maximum((hi - begin + BN - 1) // BN, 1), count)
    left_edge = gl.minimum(gl.maximum((full_lo - begin + BN - 1) // BN, 0), mine)
    right_edge = gl.maximum(gl.minimum(gl.maximum(full_hi - begin, 0) // BN, mine), left_edge)
    bitmap = Range
    if RANGE == 1:
        left_edge = gl.where(holes != 0, mine, left_edge)
        right_edge = gl.where(holes != 0, mine, right_edge)
        bitmap = Range + b.to(gl.int64) * stride_rb + BITMAP
    return b, h, bh, r0, begin, count, mine, left_edge, right_edge, row_lo, row_hi, bitmap, holes


@gluon.jit
def _first_softmax(s, tile, unit_cap, num_keys, C: gl.constexpr):
    """Softmax of a tile's first block."""
    b, h, bh, r0, begin, count, mine, left_edge, right_edge, row_lo, row_hi, bitmap, holes = tile
    score_scale, unit = unit_cap
    ROWS_LAYOUT: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    if C.softcap:
        s = tanh(s * score_scale)
    if (left_edge > 0) | (right_edge == 0):
        s = _hide(s, begin, row_lo, row_hi, bitmap, holes, num_keys, 2, C.range_layout)
    m = gl.full([64], float("-inf"), gl.float32, ROWS_LAYOUT)
    l = gl.full([64], 0.0, gl.float32, ROWS_LAYOUT)
    p, m, l, alpha = _softmax(s, m, l, unit, True)
    return p, m, l


@gluon.jit
def _other_blocks(state, use, tile, q0, q1, smem, bars, unit_cap, num_keys, CONSUMER: gl.constexpr, C: gl.constexpr):
    """All blocks of a tile but the first: those at the left edge, those that all rows see whole, the right edge."""
    b, h, bh, r0, begin, count, mine, left_edge, right_edge, row_lo, row_hi, bitmap, holes = tile
    masking = (row_lo, row_hi, bitmap, holes, num_keys)
    BN: gl.constexpr = C.block_n
    for j in range(1, left_edge):
        state = _step(state, use, begin + j * BN, q0, q1, smem, bars, masking, unit_cap, CONSUMER, 2, C)
        use += 1
    for j in range(gl.maximum(left_edge, 1), right_edge):
        state = _step(state, use, begin + j * BN, q0, q1, smem, bars, masking, unit_cap, CONSUMER, 0, C)
        use += 1
    for j in range(gl.maximum(right_edge, 1), mine):
        state = _step(state, use, begin + j * BN, q0, q1, smem, bars, masking, unit_cap, CONSUMER, 1, C)
        use += 1
    return state, use


@gluon.jit
def _leave_blocks(use, tile, bars, CONSUMER: gl.constexpr, C: gl.constexpr):
    """Pass over the blocks that only other consumers see. Not before they are full: it would count for older ones."""
    b, h, bh, r0, begin, count, mine, left_edge, right_edge, row_lo, row_hi, bitmap, holes = tile
    q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw = bars
    for _ in range(mine, count):
        stage = use % C.stages
        mbarrier.wait(k_full.index(stage), use // C.stages & 1)
        mbarrier.arrive(k_empty.index(stage), count=1)
        mbarrier.wait(v_full.index(stage), use // C.stages & 1)
        mbarrier.arrive(v_empty.index(stage), count=1)
        if C.ping_pong:
            _my_turn(CONSUMER)
            _your_turn(CONSUMER)
        use += 1
    return use


@gluon.jit
def _write(acc0, acc1, m, l, tile, descs, o_smem, pointers, num_queries, C: gl.constexpr):
    """Normalise and hand the output to the copy engine, which leaves out the rows behind the last query."""
    b, h, bh, r0, begin, count, mine, left_edge, right_edge, row_lo, row_hi, bitmap, holes = tile
    q0_desc, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, o0_desc, o1_desc = descs
    Lse, Range, Sinks = pointers
    o0_smem, o1_smem = o_smem
    DV0: gl.constexpr = C.dv0
    DV1: gl.constexpr = C.dv1
    dtype: gl.constexpr = o0_smem.dtype
    if C.sinks:
        sink = gl.load(Sinks + h).to(gl.float32) * LOG2_E
        m_new = gl.maximum(m, sink)
        m_finite = gl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = gl.exp2(m - m_finite)
        l = l * alpha + gl.exp2(sink - m_finite)
        m = m_new
    else:
        alpha = gl.full_like(m, 1.0)
    # Not l > 0: a NaN in the inputs must stay one.
    empty = l == 0.0
    shrink = alpha / gl.where(empty, 1.0, l)
    if C.lse:
        rows = r0 + gl.arange(0, 64, m.type.layout)
        lse = gl.where(empty, float("-inf"), (m + gl.log2(gl.where(empty, 1.0, l))) * LN_2)
        gl.store(Lse + bh.to(gl.int64) * num_queries + rows, lse, mask=rows < num_queries)
    # The tile before may still be on its way out of this memory.
    tma.store_wait(0)
    barrier()
    out = acc0 * gl.convert_layout(shrink, gl.SliceLayout(1, acc0.type.layout))[:, None]
    o0_smem.reshape([64, DV0]).store(out.to(dtype))
    if DV1 > 0:
        out = acc1 * gl.convert_layout(shrink, gl.SliceLayout(1, acc1.type.layout))[:, None]
        o1_smem.reshape([64, DV1]).store(out.to(dtype))
    fence_async_shared()
    barrier()
    tma_store(o0_desc, [b, h, r0, 0], o0_smem)
    if DV1 > 0:
        tma_store(o1_desc, [b, h, r0, DV0], o1_smem)


@gluon.jit
def _no_sums(C: gl.constexpr):
    """Two accumulators of zeros."""
    DV0: gl.constexpr = C.dv0
    DV1: gl.constexpr = C.dv1
    acc0 = gl.zeros([64, DV0], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV0, 16]))
    acc1 = acc0
    if DV1 > 0:
        acc1 = gl.zeros([64, DV1], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV1, 16]))
    return acc0, acc1


@gluon.jit
def consume(CONSUMER: gl.constexpr, descs, smem, bars, pointers, numbers, scales, C: gl.constexpr):
    """One consumer warpgroup: rows [64 * CONSUMER, 64 * CONSUMER + 64) of each tile, one tile after the other."""
    D0: gl.constexpr = C.d0
    D1: gl.constexpr = C.d1
    DV0: gl.constexpr = C.dv0
    DV1: gl.constexpr = C.dv1
    STAGES: gl.constexpr = C.stages
    q0_smem, q1_smem, k0_smem, k1_smem, v0_smem, v1_smem, o0_smem, o1_smem, keep_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw = bars
    num_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rs = numbers
    score_scale, cap_scale, all_heads, tiles_per_head, section = scales
    unit_cap = (score_scale, cap_scale if C.softcap else score_scale)
    q0 = q0_smem.index(CONSUMER).reshape([64, D0])
    q1 = q0
    if D1 > 0:
        q1 = q1_smem.index(CONSUMER).reshape([64, D1])
    use = 0
    if C.ping_pong:
        if CONSUMER == 1:
            _your_turn(CONSUMER)
    for turn in range(tiles_of_program(gl.program_id(0), gl.num_programs(0), all_heads * tiles_per_head)):
        tile = _tile(turn, pointers, numbers, scales, CONSUMER, C)
        acc0, acc1 = _no_sums(C)

        # The first block: there is no product with V yet.
        stage = use % STAGES
        mbarrier.wait(q_full.index(CONSUMER), turn & 1)
        mbarrier.wait(k_full.index(stage), use // STAGES & 1)
        if C.ping_pong:
            _my_turn(CONSUMER)
        s_async = _scores(q0, q1, k0_smem, k1_smem, stage, C)
        if C.ping_pong:
            _your_turn(CONSUMER)
        s = warpgroup_mma_wait(0, deps=[s_async])
        mbarrier.arrive(k_empty.index(stage), count=1)
        p, m, l = _first_softmax(s, tile, unit_cap, num_keys, C)
        mbarrier.wait(v_full.index(stage), use // STAGES & 1)
        if not ROUND_LATE:
            O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV0, 16])
            p = gl.convert_layout(p.to(k0_smem.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
        use += 1

        state = (acc0, acc1, p, m, l)
        state, use = _other_blocks(state, use, tile, q0, q1, smem, bars, unit_cap, num_keys, CONSUMER, C)
        acc0, acc1, p, m, l = state

        # The last block's product with V. The queries are done with, unless the output takes their place.
        if not C.output_in_query:
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
        stage = (use - 1) % STAGES
        acc0, acc1 = _add_values(p, v0_smem, v1_smem, stage, acc0, acc1, C)
        if DV1 > 0:
            acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
        else:
            acc0 = warpgroup_mma_wait(0, deps=[acc0])
        mbarrier.arrive(v_empty.index(stage), count=1)
        use = _leave_blocks(use, tile, bars, CONSUMER, C)
        o_smem = (o0_smem.index(CONSUMER), o1_smem.index(CONSUMER))
        _write(acc0, acc1, m, l, tile, descs, o_smem, pointers, num_queries, C)
        if C.output_in_query:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
    tma.store_wait(0)
    if C.ping_pong:
        if CONSUMER == 0:
            _my_turn(CONSUMER)

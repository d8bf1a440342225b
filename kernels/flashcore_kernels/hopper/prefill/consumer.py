"""Consumer warpgroups: scores, softmax and output of 64 queries each.

Shapes are those of a partition, which has one warpgroup or, with `C.one_copy`, both: rows are 64 or 128.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..rows import tanh
from ..triton_api import ROUND_LATE
from ..visible import row_ranges, sequence_bounds, tile_blocks, tile_keys
from .output import write
from .schedule import place_of, taken_over
from .softmax import exponents, fold_sums, hide, maxima, rescale, row_sums


@gluon.jit
def _release(empty):
    """Arrive at `empty`, each of the partition's threads for itself.

    `mbarrier.arrive` would arrive once, behind a barrier of the partition. This is meant for what a thread copies
    asynchronously; with nothing to copy a thread arrives at once.
    """
    async_copy.mbarrier_arrive(empty, increment_count=False)


@gluon.jit
def _wait_for_turn():
    """Wait until the other consumer of this partition has passed the turn on."""
    gl.inline_asm_elementwise(
        "{ .reg .b32 turn; mov.u32 turn, %tid.x; shr.u32 turn, turn, 7; add.u32 turn, turn, 10; bar.sync turn, 256; "
        "mov.u32 $0, $1; }", "=r,r", [gl.program_id(0)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _pass_turn():
    """Let the other consumer of this partition issue its products."""
    gl.inline_asm_elementwise(
        "{ .reg .b32 turn; mov.u32 turn, %tid.x; shr.u32 turn, turn, 7; sub.u32 turn, 11, turn; bar.arrive turn, 256; "
        "mov.u32 $0, $1; }", "=r,r", [gl.program_id(0)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _second_warpgroup():
    """Whether this thread is of the partition's second consumer: for ptxas, the same in all of a warp."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 number; mov.u32 number, %tid.x; shr.u32 number, number, 7; "
        "shfl.sync.idx.b32 $0, number, 0, 0x1f, 0xffffffff; mov.b32 number, $1; }", "=r,r", [gl.program_id(0)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _scores(q0, q1, k0_smem, k1_smem, stage, C: gl.constexpr):
    """Issue S = Q K^T for the block in `stage`."""
    D0: gl.constexpr = C.d0
    D1: gl.constexpr = C.d1
    BN: gl.constexpr = C.block_n
    ROWS: gl.constexpr = C.rows
    WARPS: gl.constexpr = C.warps
    zero = gl.zeros([ROWS, BN], gl.float32, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16]))
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
    p = _rounded(p, v0_smem.dtype, C)
    acc0 = warpgroup_mma(p, v0_smem.index(stage).reshape([BN, DV0]), acc0, is_async=True)
    if DV1 > 0:
        acc1 = warpgroup_mma(p, v1_smem.index(stage).reshape([BN, DV1]), acc1, is_async=True)
    return acc0, acc1


@gluon.jit
def _rounded(p, dtype: gl.constexpr, C: gl.constexpr):
    """P in 16 bits, as its product with V takes it."""
    DV0: gl.constexpr = C.dv0
    WARPS: gl.constexpr = C.warps
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DV0, 16])
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))


@gluon.jit
def _left_of_scores(s, m, unit, C: gl.constexpr):
    """What is left of a block's scores for its product with V: P, or with `C.ahead` log2 of P or the scores themselves.

    Three consumers have no registers for two blocks' numbers. ptxas then computes all exponentials before the next
    scores, and what can be computed among them costs nothing: so P's log2 are left to that place too.
    """
    if C.consumers < 3 or not C.ahead:
        s = exponents(s, m, unit)
    if not C.ahead:
        s = gl.exp2(s)
    return s


@gluon.jit
def _probabilities(p, m, l, alpha, unit, C: gl.constexpr):
    """P of what `_left_of_scores` left with `C.ahead`, and the sums with it."""
    if C.consumers == 3:
        p = exponents(p, m, unit)
    p = gl.exp2(p)
    return p, fold_sums(l, p, alpha)


@gluon.jit
def _step(state, use, n, edge, q0, q1, smem, bars, masking, unit_cap, C: gl.constexpr):
    """One block: scores and maxima, and the product with V of the block before.

    The exponentials come last, beside that product. With `C.ahead` they come first, in the next step, beside its
    scores, and the product runs beside the maxima: `p` of the state is what `_left_of_scores` says then.
    """
    DV1: gl.constexpr = C.dv1
    STAGES: gl.constexpr = C.stages
    acc0, acc1, p, m, l, alpha = state
    q0_smem, q1_smem, k0_smem, k1_smem, v0_smem, v1_smem, keep_smem, o_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw = bars
    row_lo, row_hi, line, holes, num_keys = masking
    score_scale, unit = unit_cap
    stage = use % STAGES
    before = (use - 1) % STAGES
    if C.ahead and C.consumers == 3:
        p, l = _probabilities(p, m, l, alpha, unit, C)
        # Here, in front of the branch that waiting is: ptxas moves the exponentials over it, but not this.
        p = _rounded(p, k0_smem.dtype, C)
    mbarrier.wait(k_full.index(stage), use // STAGES & 1)
    if C.turns:
        _wait_for_turn()
    s_async = _scores(q0, q1, k0_smem, k1_smem, stage, C)
    if C.ahead and C.consumers < 3:
        p, l = _probabilities(p, m, l, alpha, unit, C)
    acc0_async, acc1_async = _add_values(p, v0_smem, v1_smem, before, acc0, acc1, C)
    if C.turns:
        _pass_turn()
    s = warpgroup_mma_wait(2 if DV1 > 0 else 1, deps=[s_async])
    _release(k_empty.index(stage))
    if C.softcap:
        s = tanh(s * score_scale)
    if edge:
        s = hide(s, n, row_lo, row_hi, line, holes, num_keys, C)
    m, alpha = maxima(s, m, unit)
    p = _left_of_scores(s, m, unit, C)
    if not C.ahead:
        l = fold_sums(l, p, alpha)
    # The softmax is to run while the product with V does. ptxas would move it behind the wait for that product, but not
    # over a branch, which waiting for the next step's V is, where an exchange needs it (row_sums, and the maxima); and
    # p among the dependencies stops everything before ptxas.
    mbarrier.wait(v_full.index(stage), use // STAGES & 1)
    if DV1 > 0:
        acc0, acc1, p = warpgroup_mma_wait(0, deps=[acc0_async, acc1_async, p])
    else:
        acc0, p = warpgroup_mma_wait(0, deps=[acc0_async, p])
    _release(v_empty.index(before))
    acc0 = rescale(acc0, alpha)
    if DV1 > 0:
        acc1 = rescale(acc1, alpha)
    if not C.ahead and not ROUND_LATE:
        p = _rounded(p, k0_smem.dtype, C)
    return acc0, acc1, p, m, l, alpha


@gluon.jit
def _tile(place, pointers, numbers, scales, CONSUMER: gl.constexpr, C: gl.constexpr):
    """The tile at this place, as one of its program's consumers sees it. Any tile where there is none.

    Returns (b, h, head of all sequences, first row; first key of the first block, how many blocks the tile visits, how
    many of them this consumer computes; the first `left_edge` of those and those from `right_edge` on with a look at
    each row's range; these ranges; holes of the KeyRange).
    """
    Lse, Range, Sinks = pointers
    num_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rs = numbers
    score_scale, cap_scale, all_heads, tiles_per_head, section = scales
    BN: gl.constexpr = C.block_n
    BM: gl.constexpr = 64 * C.consumers
    ROWS: gl.constexpr = C.rows
    WARPS: gl.constexpr = C.warps
    RANGE: gl.constexpr = C.range_layout
    ROWS_LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16]))
    b, h, tile = place
    bh = b * num_heads + h
    m0 = gl.maximum(tile, 0) * BM
    r0 = m0 + CONSUMER * ROWS
    rows = r0 + gl.arange(0, ROWS, ROWS_LAYOUT)
    sequence = sequence_bounds(Range, b, numbers, RANGE)
    first, end, start, left, right, holes = sequence
    tile_lo, tile_hi = tile_keys(Range, b, m0, sequence, numbers, BM, RANGE, WARPS)
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
        last = gl.minimum(r0 + ROWS, num_queries) - 1
        hi = gl.where(r0 < num_queries, gl.minimum(end, start + last + right + 1), 0)
        full_lo = gl.maximum(first, start + last - left)
        full_hi = gl.minimum(end, start + r0 + right + 1)
    mine = gl.minimum(gl.maximum((hi - begin + BN - 1) // BN, 1), count)
    left_edge = gl.minimum(gl.maximum((full_lo - begin + BN - 1) // BN, 0), mine)
    right_edge = gl.maximum(gl.minimum(gl.maximum(full_hi - begin, 0) // BN, mine), left_edge)
    if RANGE == 1:
        left_edge = gl.where(holes != 0, mine, left_edge)
        right_edge = gl.where(holes != 0, mine, right_edge)
    return b, h, bh, r0, begin, count, mine, left_edge, right_edge, row_lo, row_hi, holes


@gluon.jit
def _first_block(s, tile, unit_cap, Range, stride_rb, num_keys, C: gl.constexpr):
    """Of a tile's first block: what `_left_of_scores` says, the maxima, and what older sums shrink by."""
    b, h, bh, r0, begin, count, mine, left_edge, right_edge, row_lo, row_hi, holes = tile
    score_scale, unit = unit_cap
    ROWS: gl.constexpr = C.rows
    ROWS_LAYOUT: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    if C.softcap:
        s = tanh(s * score_scale)
    if (left_edge > 0) | (right_edge == 0):
        s = hide(s, begin, row_lo, row_hi, (Range, b, stride_rb), holes, num_keys, C)
    m, alpha = maxima(s, gl.full([ROWS], float("-inf"), gl.float32, ROWS_LAYOUT), unit)
    return _left_of_scores(s, m, unit, C), m, alpha


@gluon.jit
def _other_blocks(state, use, tile, q0, q1, smem, bars, unit_cap, Range, stride_rb, num_keys, C: gl.constexpr):
    """All blocks of a tile but the first: those at the left edge, those that all rows see whole, the right edge."""
    b, h, bh, r0, begin, count, mine, left_edge, right_edge, row_lo, row_hi, holes = tile
    BN: gl.constexpr = C.block_n
    masking = (row_lo, row_hi, (Range, b, stride_rb), holes, num_keys)
    for j in range(1, mine):
        edge = (j < left_edge) | (j >= right_edge)
        state = _step(state, use, begin + j * BN, edge, q0, q1, smem, bars, masking, unit_cap, C)
        use += 1
    return state, use


@gluon.jit
def _leave_blocks(use, tile, bars, C: gl.constexpr):
    """Pass over the blocks that only other consumers see. Not before they are full: it would count for older ones."""
    b, h, bh, r0, begin, count, mine, left_edge, right_edge, row_lo, row_hi, holes = tile
    q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw = bars
    for _ in range(mine, count):
        stage = use % C.stages
        mbarrier.wait(k_full.index(stage), use // C.stages & 1)
        _release(k_empty.index(stage))
        mbarrier.wait(v_full.index(stage), use // C.stages & 1)
        _release(v_empty.index(stage))
        use += 1
    return use


@gluon.jit
def _no_sums(C: gl.constexpr):
    """Two accumulators of zeros."""
    DV0: gl.constexpr = C.dv0
    DV1: gl.constexpr = C.dv1
    ROWS: gl.constexpr = C.rows
    WARPS: gl.constexpr = C.warps
    acc0 = gl.zeros([ROWS, DV0], gl.float32, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DV0, 16]))
    acc1 = acc0
    if DV1 > 0:
        acc1 = gl.zeros([ROWS, DV1], gl.float32, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DV1, 16]))
    return acc0, acc1


@gluon.jit
def consume(CONSUMER: gl.constexpr, descs, smem, bars, queue, output, pointers, numbers, scales, C: gl.constexpr):
    """A partition of consumers: its rows, from `C.rows * CONSUMER` on, of each tile, one tile after the other."""
    D0: gl.constexpr = C.d0
    D1: gl.constexpr = C.d1
    DV1: gl.constexpr = C.dv1
    STAGES: gl.constexpr = C.stages
    SLOTS: gl.constexpr = C.query_slots
    ROWS: gl.constexpr = C.rows
    q0_smem, q1_smem, k0_smem, k1_smem, v0_smem, v1_smem, keep_smem, o_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw = bars
    num_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rs = numbers
    score_scale, cap_scale, all_heads, tiles_per_head, section = scales
    unit_cap = (score_scale, cap_scale if C.softcap else score_scale)
    place = place_of(gl.program_id(0), num_heads, scales)
    tile = _tile(place, pointers, numbers, scales, CONSUMER, C)
    turn = 0
    use = 0
    if C.turns:
        if _second_warpgroup() == 1:
            _pass_turn()
    while place[2] >= 0:
        slot = CONSUMER * SLOTS + turn % SLOTS
        q0 = q0_smem.index(slot).reshape([ROWS, D0])
        q1 = q0
        if D1 > 0:
            q1 = q1_smem.index(slot).reshape([ROWS, D1])
        acc0, acc1 = _no_sums(C)

        # The first block: there is no product with V yet.
        stage = use % STAGES
        mbarrier.wait(q_full.index(slot), turn // SLOTS & 1)
        mbarrier.wait(k_full.index(stage), use // STAGES & 1)
        if C.turns:
            _wait_for_turn()
        s_async = _scores(q0, q1, k0_smem, k1_smem, stage, C)
        if C.turns:
            _pass_turn()
        s = warpgroup_mma_wait(0, deps=[s_async])
        _release(k_empty.index(stage))
        p, m, alpha = _first_block(s, tile, unit_cap, pointers[1], stride_rb, num_keys, C)
        if C.ahead:
            l = row_sums(gl.full_like(p, 0.0))
        else:
            l = row_sums(p)
        if SLOTS == 2 and not C.one_copy:
            if turn > 0:  # the output of the tile before has left by now
                tma.store_wait(0)
                _release(q_empty.index(CONSUMER * SLOTS + (turn + 1) % SLOTS))
        mbarrier.wait(v_full.index(stage), use // STAGES & 1)
        if not C.ahead and not ROUND_LATE:
            p = _rounded(p, k0_smem.dtype, C)
        use += 1

        state = (acc0, acc1, p, m, l, alpha)
        state, use = _other_blocks(state, use, tile, q0, q1, smem, bars, unit_cap, pointers[1], stride_rb, num_keys, C)
        acc0, acc1, p, m, l, alpha = state

        if SLOTS == 1:  # the output leaves elsewhere
            _release(q_empty.index(slot))
        # The last block's product with V, and beside it what the next tile is.
        stage = (use - 1) % STAGES
        if C.ahead:
            p, l = _probabilities(p, m, l, alpha, unit_cap[1], C)
        acc0_async, acc1_async = _add_values(p, v0_smem, v1_smem, stage, acc0, acc1, C)
        place = taken_over(queue, turn, C.warps)
        if SLOTS == 2 and C.one_copy:  # elsewhere too, but not before the place was read, see hand_out
            _release(q_empty.index(slot))
        next_tile = _tile(place, pointers, numbers, scales, CONSUMER, C)
        if DV1 > 0:
            acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0_async, acc1_async])
        else:
            acc0 = warpgroup_mma_wait(0, deps=[acc0_async])
        _release(v_empty.index(stage))
        use = _leave_blocks(use, tile, bars, C)
        o_smems = (o_smem.index(slot), q1_smem.index(slot))
        write(acc0, acc1, m, l, tile, descs, o_smems, output, pointers, num_queries, C)
        tile = next_tile
        turn += 1
    if C.turns:
        if _second_warpgroup() == 0:
            _wait_for_turn()
    if not C.one_copy:
        tma.store_wait(0)

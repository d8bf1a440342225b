"""Consumer warpgroups: scores, softmax and output of 64 queries each.

Shapes are those of a partition, which has one warpgroup or, with `C.one_copy`, both: rows are 64 or 128.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..copies import release
from ..dropout import marked, row_dropout, stay_rounded
from ..packed import packed_tile_of, told_position
from ..query_tile import pass_over_blocks, tile_of
from ..rows import tanh
from ..schedule import next_position, position_of
from ..triton_api import ROUND_LATE
from .masks import BIAS, FLAGS, NO_MASK, block_list, listed_tile_of, mask_ahead, masked, pass_over_listed_blocks
from .output import write, write_packed
from .records import Softmax
from .softmax import exponents, fold_sums, hide, maxima, rescale, row_sums


@gluon.jit
def _wait_for_turn():
    """Wait until the other consumer of this partition has passed the turn on.

    For that there are two named barriers of 256 threads: 10 where the first consumer waits, 11 where the second does.
    """
    gl.inline_asm_elementwise(
        "{ .reg .b32 turn; mov.u32 turn, %tid.x; shr.u32 turn, turn, 7; add.u32 turn, turn, 10; bar.sync turn, 256; "
        "mov.u32 $0, $1; }", "=r,r", [gl.program_id(0)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _pass_turn():
    """Let the other consumer of this partition issue its products: arrive at the barrier where it waits."""
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
def issue_scores(q0, q1, buffers, stage, C: gl.constexpr):
    """Issue S = Q K^T for the block in `stage`."""
    D0: gl.constexpr = C.d0
    D1: gl.constexpr = C.d1
    BN: gl.constexpr = C.block_n
    ROWS: gl.constexpr = C.rows
    WARPS: gl.constexpr = C.warps
    zero = gl.zeros([ROWS, BN], gl.float32, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16]))
    k0 = buffers.k0.index(stage).reshape([BN, D0])  # [N, D0]
    s = warpgroup_mma(q0, k0.permute((1, 0)), zero, use_acc=False, is_async=True)
    if D1 > 0:
        k1 = buffers.k1.index(stage).reshape([BN, D1])  # [N, D1]
        s = warpgroup_mma(q1, k1.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def issue_values(p, buffers, stage, acc0, acc1, C: gl.constexpr):
    """Issue acc += P V for the block in `stage`."""
    DV0: gl.constexpr = C.dv0
    DV1: gl.constexpr = C.dv1
    BN: gl.constexpr = C.block_n
    p = _rounded(p, buffers.v0.dtype, C)
    acc0 = warpgroup_mma(p, buffers.v0.index(stage).reshape([BN, DV0]), acc0, is_async=True)
    if DV1 > 0:
        acc1 = warpgroup_mma(p, buffers.v1.index(stage).reshape([BN, DV1]), acc1, is_async=True)
    return acc0, acc1


@gluon.jit
def _rounded(p, dtype: gl.constexpr, C: gl.constexpr):
    """P in 16 bits, as its product with V takes it."""
    DV0: gl.constexpr = C.dv0
    WARPS: gl.constexpr = C.warps
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DV0, 16])
    if C.dropout and p.dtype == gl.float32:
        p = stay_rounded(p, dtype)
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))


@gluon.jit
def _left_of_scores(s, m, to_log2, C: gl.constexpr):
    """What a block's scores become as soon as its maxima m are known. `_probabilities` does the rest.

    Without `C.scores_ahead` that is P: nothing is left to do.

    With it, log2 of P: the exponentials wait for the next step, where they run beside the product of the next scores.

    With three consumers it is the scores as they are. A thread then has no registers for the numbers of two blocks, and
    ptxas computes all exponentials before the next scores. Beside the exponentials even log2 of P costs nothing, so
    that is left to the next step, too.
    """
    if C.consumers < 3 or not C.scores_ahead:
        s = exponents(s, m, to_log2)
    if not C.scores_ahead:
        s = gl.exp2(s)
    return s


@gluon.jit
def _probabilities(p, m, l, alpha, to_log2, n, drop, C: gl.constexpr):
    """(P, l): with `C.scores_ahead`, P of what `_left_of_scores` left, and the sums l with it.

    P, whose keys are those from n on, is as `marked` leaves it; l is of all weights.
    """
    if C.consumers == 3:
        p = exponents(p, m, to_log2)
    p = gl.exp2(p)
    l = fold_sums(l, p, alpha)
    return marked(p, n, drop, C), l


@gluon.jit
def _to_log2(factors, C: gl.constexpr):
    """The factor that leaves scores in units of log2: Q K^T, or with softcap its tanh. Beside a bias they are so."""
    if C.mask >= BIAS:
        return 1.0
    else:
        return factors.cap_scale if C.softcap else factors.score_scale


@gluon.jit
def _capped(s, factors, C: gl.constexpr):
    """Scores as they are before masks: with softcap their tanh, and with a bias in units of log2."""
    if C.softcap:
        s = tanh(s * factors.score_scale)
    if C.mask >= BIAS:
        s = s * (factors.cap_scale if C.softcap else factors.score_scale)
    return s


@gluon.jit
def _first_position(call, C: gl.constexpr):
    if C.packed:
        return told_position(call.queue, 0, C.warps)
    else:
        return position_of(gl.program_id(0), call.heads.num_heads, call.order)


@gluon.jit
def _next_position(call, tiles_done, C: gl.constexpr):
    if C.packed:
        return told_position(call.queue, tiles_done + 1, C.warps)
    else:
        return next_position(call.queue, tiles_done, C.warps)


@gluon.jit
def _tile_of(position, call, CONSUMER: gl.constexpr, C: gl.constexpr):
    if C.packed:
        return packed_tile_of(position, call, CONSUMER, C)
    elif C.mask == NO_MASK:
        return tile_of(position, call, CONSUMER, C)
    else:
        return listed_tile_of(position, call, CONSUMER, C)


@gluon.jit
def _step(softmax, use, n, edge, entry, q0, q1, tile, drop, call, C: gl.constexpr):
    """One block: its scores and maxima, and the product with V of the block before. Returns a Softmax.

    The exponentials come last, beside that product. With `C.scores_ahead` they come first, in the next step, beside its
    scores, and the product runs beside the maxima.

    Args:
        softmax: of the blocks before.
        use: how many blocks this partition has computed or passed over: the block's stage and phase follow from it.
        n: the block's first key.
        edge: whether its scores are masked row by row.
        entry: with a dense mask, the block's in the tile's list.
        tile, drop, call: a Tile, its `row_dropout`, a Call.
    """
    DV1: gl.constexpr = C.dv1
    STAGES: gl.constexpr = C.stages
    buffers = call.buffers
    barriers = call.barriers
    to_log2 = _to_log2(call.factors, C)
    acc0, acc1, p, m, l, alpha = softmax
    stage = use % STAGES
    before = (use - 1) % STAGES
    if C.scores_ahead and C.consumers == 3:
        p, l = _probabilities(p, m, l, alpha, to_log2, n - C.block_n, drop, C)
        # Here, in front of the branch in the wait below: ptxas moves exponentials over it, but not this.
        p = _rounded(p, buffers.k0.dtype, C)
    if C.mask != NO_MASK:
        ahead = mask_ahead(entry, tile, call, C)
    mbarrier.wait(barriers.k_full.index(stage), use // STAGES & 1)
    if C.turns:
        _wait_for_turn()
    s_async = issue_scores(q0, q1, buffers, stage, C)
    if C.scores_ahead and C.consumers < 3:
        p, l = _probabilities(p, m, l, alpha, to_log2, n - C.block_n, drop, C)
    acc0_async, acc1_async = issue_values(p, buffers, before, acc0, acc1, C)
    if C.turns:
        _pass_turn()
    s = warpgroup_mma_wait(2 if DV1 > 0 else 1, deps=[s_async])
    release(barriers.k_empty.index(stage))
    s = _capped(s, call.factors, C)
    if C.mask != NO_MASK:
        s = masked(s, ahead, entry, use, tile, call, C)
    if edge:
        s = hide(s, n, tile, call.pointers.key_range, call.visibility, C)
    m, alpha = maxima(s, m, to_log2)
    p = _left_of_scores(s, m, to_log2, C)
    if not C.scores_ahead:
        l = fold_sums(l, p, alpha)
        p = marked(p, n, drop, C)
    # All of the softmax above is to run while the product with V does. Left alone, ptxas moves it behind the wait for
    # that product. Two things keep it here. First, this wait for the V of the next step's product: it is a branch, and
    # what an exchange between threads needs (in `row_sums` and `maxima`) ptxas does not move over one. Second, p is
    # among the dependencies of the wait for the product, so that no compiler before ptxas moves it either.
    mbarrier.wait(barriers.v_full.index(stage), use // STAGES & 1)
    if DV1 > 0:
        acc0, acc1, p = warpgroup_mma_wait(0, deps=[acc0_async, acc1_async, p])
    else:
        acc0, p = warpgroup_mma_wait(0, deps=[acc0_async, p])
    release(barriers.v_empty.index(before))
    acc0 = rescale(acc0, alpha)
    if DV1 > 0:
        acc1 = rescale(acc1, alpha)
    if not C.scores_ahead and not ROUND_LATE:
        p = _rounded(p, buffers.k0.dtype, C)
    return Softmax(acc0=acc0, acc1=acc1, p=p, m=m, l=l, alpha=alpha)


@gluon.jit
def _first_block(s, use, entry, ahead, tile, call, C: gl.constexpr):
    """Of a tile's first block: what `_left_of_scores` says, the maxima, and what older sums shrink by."""
    ROWS: gl.constexpr = C.rows
    ROWS_LAYOUT: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    to_log2 = _to_log2(call.factors, C)
    s = _capped(s, call.factors, C)
    n = tile.begin
    if C.mask != NO_MASK:
        n = entry // FLAGS * C.block_n
        s = masked(s, ahead, entry, use, tile, call, C)
    if (tile.left_edge > 0) | (tile.right_edge == 0):
        s = hide(s, n, tile, call.pointers.key_range, call.visibility, C)
    m, alpha = maxima(s, gl.full([ROWS], float("-inf"), gl.float32, ROWS_LAYOUT), to_log2)
    return _left_of_scores(s, m, to_log2, C), m, alpha


@gluon.jit
def _other_blocks(softmax, use, q0, q1, tile, drop, call, C: gl.constexpr):
    """All blocks of a tile but the first: those at the left edge, those whose keys all rows see, the right edge."""
    BN: gl.constexpr = C.block_n
    if C.mask == NO_MASK:
        for j in range(1, tile.own_blocks):
            edge = (j < tile.left_edge) | (j >= tile.right_edge)
            softmax = _step(softmax, use, tile.begin + j * BN, edge, 0, q0, q1, tile, drop, call, C)
            use += 1
    else:
        entries = block_list(call.mask, tile.b, tile.h, tile.r0 // (64 * C.consumers)) + tile.begin
        next_entry = gl.load(entries + 1)
        for j in range(1, tile.own_blocks):
            edge = (j < tile.left_edge) | (j >= tile.right_edge)
            entry = next_entry
            next_entry = gl.load(entries + j + 1)  # there is one behind the last
            softmax = _step(softmax, use, entry // FLAGS * BN, edge, entry, q0, q1, tile, drop, call, C)
            use += 1
    return softmax, use


@gluon.jit
def no_sums(C: gl.constexpr):
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
def consume(CONSUMER: gl.constexpr, call, output_rows, C: gl.constexpr):
    """A partition of consumers: its rows, from `C.rows * CONSUMER` on, of each tile, one tile after the other.

    Args:
        call: a Call.
        output_rows: an OutputRows with `C.one_copy`, otherwise never looked at.
    """
    D0: gl.constexpr = C.d0
    D1: gl.constexpr = C.d1
    DV1: gl.constexpr = C.dv1
    STAGES: gl.constexpr = C.stages
    QUERY_BUFFERS: gl.constexpr = C.query_buffers
    ROWS: gl.constexpr = C.rows
    buffers = call.buffers
    barriers = call.barriers
    to_log2 = _to_log2(call.factors, C)
    position = _first_position(call, C)
    tile = _tile_of(position, call, CONSUMER, C)
    tiles_done = 0
    use = 0
    if C.turns:
        if _second_warpgroup() == 1:
            _pass_turn()
    while position.tile >= 0:
        buffer = CONSUMER * QUERY_BUFFERS + tiles_done % QUERY_BUFFERS
        q0 = buffers.q0.index(buffer).reshape([ROWS, D0])
        q1 = q0
        if D1 > 0:
            q1 = buffers.q1.index(buffer).reshape([ROWS, D1])
        drop = row_dropout(tile, call, C)
        acc0, acc1 = no_sums(C)

        # The first block: there is no product with V yet.
        stage = use % STAGES
        entry = tile.begin
        ahead = entry
        if C.mask != NO_MASK:
            entry = gl.load(block_list(call.mask, tile.b, tile.h, tile.r0 // (64 * C.consumers)) + tile.begin)
            ahead = mask_ahead(entry, tile, call, C)
        mbarrier.wait(barriers.q_full.index(buffer), tiles_done // QUERY_BUFFERS & 1)
        mbarrier.wait(barriers.k_full.index(stage), use // STAGES & 1)
        if C.turns:
            _wait_for_turn()
        s_async = issue_scores(q0, q1, buffers, stage, C)
        if C.turns:
            _pass_turn()
        s = warpgroup_mma_wait(0, deps=[s_async])
        release(barriers.k_empty.index(stage))
        p, m, alpha = _first_block(s, use, entry, ahead, tile, call, C)
        if C.scores_ahead:
            l = row_sums(gl.full_like(p, 0.0))
        else:
            l = row_sums(p)
            p = marked(p, tile.begin, drop, C)
        if QUERY_BUFFERS == 2 and not C.from_registers:
            if tiles_done > 0:  # the output of the tile before has left its buffer by now
                tma.store_wait(0)
                release(barriers.q_empty.index(CONSUMER * QUERY_BUFFERS + (tiles_done + 1) % QUERY_BUFFERS))
        mbarrier.wait(barriers.v_full.index(stage), use // STAGES & 1)
        if not C.scores_ahead and not ROUND_LATE:
            p = _rounded(p, buffers.k0.dtype, C)
        use += 1

        softmax = Softmax(acc0=acc0, acc1=acc1, p=p, m=m, l=l, alpha=alpha)
        softmax, use = _other_blocks(softmax, use, q0, q1, tile, drop, call, C)
        acc0, acc1, p, m, l, alpha = softmax

        if QUERY_BUFFERS == 1:  # the output leaves through a buffer of its own
            release(barriers.q_empty.index(buffer))
        # The last block's product with V, and beside it what the next tile is.
        stage = (use - 1) % STAGES
        if C.scores_ahead:
            n = tile.begin + (tile.own_blocks - 1) * C.block_n
            p, l = _probabilities(p, m, l, alpha, to_log2, n, drop, C)
        acc0_async, acc1_async = issue_values(p, buffers, stage, acc0, acc1, C)
        position = _next_position(call, tiles_done, C)
        if QUERY_BUFFERS == 2 and C.from_registers:  # the output leaves from registers; for the order see hand_out
            release(barriers.q_empty.index(buffer))
        next_tile = _tile_of(position, call, CONSUMER, C)
        if DV1 > 0:
            acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0_async, acc1_async])
        else:
            acc0 = warpgroup_mma_wait(0, deps=[acc0_async])
        release(barriers.v_empty.index(stage))
        if C.mask == BIAS:
            use = pass_over_listed_blocks(use, tile, call, C)
        else:
            use = pass_over_blocks(use, tile, barriers, C)
        if C.packed:
            write_packed(acc0, m, l, tile, call, C)
        else:
            write(acc0, acc1, m, l, tile, buffers.o0.index(buffer), buffers.q1.index(buffer), output_rows, call, C)
        tile = next_tile
        tiles_done += 1
    if C.turns:
        if _second_warpgroup() == 0:
            _wait_for_turn()
    if not C.from_registers:
        tma.store_wait(0)

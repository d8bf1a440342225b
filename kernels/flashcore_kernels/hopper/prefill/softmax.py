"""The softmax of a partition's queries: masks, maxima, exponentials, and their sums."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..visible import BITMAP

# A row's maximum follows the scores only where they exceed it by this much, in units of log2. So P is at most 256,
# which fp16 holds, and hardly a block has the earlier sums rescaled.
SLACK = gl.constexpr(8.0)


def _rescale_asm(count: int) -> tuple[str, str]:
    """PTX that multiplies `count` registers by as many factors, unless these are 1 in the whole warp; its constraints.

    A thread has two rows. Factors 0 and 2 are looked at: they belong to one row and to the other.
    """
    lines = [
        "{ .reg .pred some;",
        f"setp.neu.f32 some, ${2 * count}, 0f3f800000;",
        f"setp.neu.or.f32 some, ${2 * count + 2}, 0f3f800000, some;",
        "vote.sync.any.pred some, some, 0xffffffff;",
        "@!some bra.uni kept;",
        *(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)),
        "kept: }",
    ]
    return " ".join(lines), ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


RESCALE_64, RESCALED_64 = map(gl.constexpr, _rescale_asm(64))
RESCALE_32, RESCALED_32 = map(gl.constexpr, _rescale_asm(32))


@gluon.jit
def rescale(acc, alpha):
    """acc * alpha[:, None]. Of a large acc a warp multiplies nothing where alpha is 1 in all of its rows."""
    factors = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    # A thread has half as many registers of acc as acc has columns. With 16 the question costs as much as it saves.
    if acc.shape[1] >= 64:
        ASM: gl.constexpr = RESCALE_64 if acc.shape[1] >= 128 else RESCALE_32
        CONSTRAINTS: gl.constexpr = RESCALED_64 if acc.shape[1] >= 128 else RESCALED_32
        PACK: gl.constexpr = 64 if acc.shape[1] >= 128 else 32
        factors = gl.full_like(acc, 0.0) + factors
        acc = gl.inline_asm_elementwise(ASM, CONSTRAINTS, [acc, factors], dtype=gl.float32, is_pure=True, pack=PACK)
    else:
        acc = acc * factors
    return acc


@gluon.jit
def hide_by_constants(s, n, row_lo, row_hi):
    """-inf where a key is not in its row's [row_lo, row_hi).

    A thread has the columns 8 * i + 2 * lane + j of its rows, where i and j are known to the compiler. So 2 * lane is
    taken from the bounds once, and what is compared with them are constants: that takes half of the instructions.
    """
    BN: gl.constexpr = s.shape[1]
    parts = s.reshape([s.shape[0], BN // 8, 4, 2])
    LAYOUT: gl.constexpr = parts.type.layout
    ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT)))
    i = gl.arange(0, BN // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))))
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT))))
    j = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))))
    column = 8 * i[None, :, None, None] + j[None, None, None, :]
    first = 2 * lane[None, None, :, None]
    lo = gl.convert_layout(row_lo - n, ROWS)[:, None, None, None] - first
    hi = gl.convert_layout(row_hi - n, ROWS)[:, None, None, None] - first
    parts = gl.where((column >= lo) & (column < hi), parts, float("-inf"))
    return gl.convert_layout(parts.reshape([s.shape[0], BN]), s.type.layout)


@gluon.jit
def hide(s, n, tile, Range, visibility, C: gl.constexpr):
    """Scores s `[rows, N]` of the keys from n on, with -inf where a row does not see a key.

    Args:
        tile: a Tile.
        Range: the KeyRange, looked at where the tile has holes.
        visibility: a Visibility.
    """
    BN: gl.constexpr = s.shape[1]
    cols = n + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
    if C.short_masks:
        s = hide_by_constants(s, n, tile.row_lo, tile.row_hi)
    else:
        s = gl.where((cols[None, :] >= tile.row_lo[:, None]) & (cols[None, :] < tile.row_hi[:, None]), s, float("-inf"))
    if C.range_layout == 1:
        if tile.holes != 0:
            bitmap = Range + tile.b.to(gl.int64) * visibility.stride_rb + BITMAP
            word = gl.load(bitmap + (cols >> 5), mask=cols < visibility.num_keys, other=0)
            s = gl.where((((word >> (cols & 31)) & 1) == 1)[None, :], s, float("-inf"))
    return s


@gluon.jit
def _of_thread(s):
    """s `[rows, N]` as `[rows, N / 32, 4, 4, 2]`. Of its rows a thread has one index of the last axis but one.

    So sums and maxima over the other axes need no exchange between threads.
    """
    BN: gl.constexpr = s.shape[1]
    return s.reshape([s.shape[0], BN // 32, 4, 4, 2])


@gluon.jit
def row_sums(p):
    """Sums `[rows, 4]` of probabilities p `[rows, N]`: one for each of the four threads that share a row.

    Each is the sum of what a thread and its neighbour hold, so that two and two are equal. `row_totals` adds them up,
    once a tile.

    The exchange with the neighbour is here for ptxas' sake. If it can, it moves exponentials behind the wait for a
    product, where nothing runs beside them. It never moves an exchange, and so not the exponentials that it needs.
    """
    sums = gl.sum(gl.sum(gl.sum(_of_thread(p), axis=1), axis=1), axis=2)
    return gl.inline_asm_elementwise(
        "{ .reg .b32 other; shfl.sync.bfly.b32 other, $1, 1, 0x1f, 0xffffffff; add.f32 $0, $1, other; }", "=f,f",
        [sums], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def row_totals(l, m):
    """Sums `[rows]` of the probabilities of rows, laid out as `m`. Each probability is in two of the four sums in l."""
    return gl.convert_layout(gl.sum(l, axis=1), m.type.layout) * 0.5


@gluon.jit
def _finite(m):
    """A row that has seen no key yet has m = -inf, and -inf - -inf is NaN."""
    return gl.where(m == float("-inf"), 0.0, m)


@gluon.jit
def maxima(s, m, to_log2):
    """Fold the scores s * to_log2, in units of log2, into the maxima m; returns m and what older sums shrink by."""
    # By short chains rather than a long one.
    largest = gl.max(gl.max(gl.max(_of_thread(s), axis=1), axis=1), axis=2)
    largest = gl.convert_layout(gl.max(largest, axis=1), gl.SliceLayout(1, s.type.layout)) * to_log2
    m_new = gl.where(largest > m + SLACK, largest, m)
    return m_new, gl.exp2(m - _finite(m_new))


@gluon.jit
def exponents(s, m, to_log2):
    """log2 of the probabilities, of the scores s * to_log2 and the maxima m, both in units of log2."""
    return gl.fma(s, gl.full_like(s, 0.0) + to_log2, gl.full_like(s, 0.0) - _finite(m)[:, None])


@gluon.jit
def fold_sums(l, p, alpha):
    """The sums l `[rows, 4]`, shrunk by alpha `[rows]`, with one more block's probabilities p."""
    sums = row_sums(p)
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, sums.type.layout))[:, None]
    return gl.fma(l, gl.full_like(l, 0.0) + alpha, sums)

"""The softmax of a partition's queries: masks, maxima, exponentials, and their sums."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..visible import BITMAP

# A row's maximum follows the scores only where they exceed it by this much, in units of log2: P is at most 256 then,
# which fp16 holds, and hardly a block has the sums so far rescaled.
SLACK = gl.constexpr(8.0)


def _rescale_asm(count: int) -> tuple[str, str]:
    """PTX that multiplies `count` registers by as many, unless these are 1 in the whole warp; and its constraints.

    Registers 0 and 2 belong to the two rows that a thread has.
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
    """acc * alpha[:, None], of which a warp whose rows all have alpha = 1 skips everything where that is much."""
    factors = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    # A thread has half as many registers of it as it has columns. Of 16 a look would cost as much as it saves.
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
def _hide_by_constants(s, n, row_lo, row_hi):
    """-inf where a key is not in its row's [row_lo, row_hi).

    A thread has the columns 8 * i + 2 * lane + j of its rows. Its own part of that is taken from the bounds, so that
    they are compared with constants: that takes half of the instructions.
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
def hide(s, n, row_lo, row_hi, line, holes, num_keys, C: gl.constexpr):
    """-inf where a row does not see a key."""
    BN: gl.constexpr = s.shape[1]
    cols = n + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
    if C.short_masks:
        s = _hide_by_constants(s, n, row_lo, row_hi)
    else:
        s = gl.where((cols[None, :] >= row_lo[:, None]) & (cols[None, :] < row_hi[:, None]), s, float("-inf"))
    if C.range_layout == 1:
        if holes != 0:
            Range, b, stride_rb = line
            bitmap = Range + b.to(gl.int64) * stride_rb + BITMAP
            word = gl.load(bitmap + (cols >> 5), mask=cols < num_keys, other=0)
            s = gl.where((((word >> (cols & 31)) & 1) == 1)[None, :], s, float("-inf"))
    return s


@gluon.jit
def _of_thread(s):
    """`[rows, N]` as `[rows, N / 32, 4, 4, 2]`: a thread has of its rows all of one index of the last axis but one"""
    BN: gl.constexpr = s.shape[1]
    return s.reshape([s.shape[0], BN // 32, 4, 4, 2])


@gluon.jit
def row_sums(p):
    """Sums `[rows, 4]` of the probabilities that each thread and its neighbour hold of a row: four threads have a row.

    All four are added up once a tile (`whole_sums`). The exchange with the neighbour stands here because ptxas moves
    an exponential behind the wait for a product if it can, but never an exchange.
    """
    sums = gl.sum(gl.sum(gl.sum(_of_thread(p), axis=1), axis=1), axis=2)
    return gl.inline_asm_elementwise(
        "{ .reg .b32 other; shfl.sync.bfly.b32 other, $1, 1, 0x1f, 0xffffffff; add.f32 $0, $1, other; }", "=f,f",
        [sums], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def whole_sums(l, m):
    """Sums of whole rows, laid out as `m`; half, because each number is in two of the four."""
    return gl.convert_layout(gl.sum(l, axis=1), m.type.layout) * 0.5


@gluon.jit
def _finite(m):
    """A row that has seen no key yet has m = -inf, and -inf - -inf is NaN."""
    return gl.where(m == float("-inf"), 0.0, m)


@gluon.jit
def maxima(s, m, unit):
    """Fold the scores s * unit (log2 units) into m; returns m and what older sums shrink by."""
    # By short chains rather than a long one.
    largest = gl.max(gl.max(gl.max(_of_thread(s), axis=1), axis=1), axis=2)
    largest = gl.convert_layout(gl.max(largest, axis=1), gl.SliceLayout(1, s.type.layout)) * unit
    m_new = gl.where(largest > m + SLACK, largest, m)
    return m_new, gl.exp2(m - _finite(m_new))


@gluon.jit
def exponents(s, m, unit):
    """log2 of the probabilities, of scores s * unit (log2 units) and the maxima m."""
    return gl.fma(s, gl.full_like(s, 0.0) + unit, gl.full_like(s, 0.0) - _finite(m)[:, None])


@gluon.jit
def fold_sums(l, p, alpha):
    """The sums `[rows, 4]` with one more block."""
    sums = row_sums(p)
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, sums.type.layout))[:, None]
    return gl.fma(l, gl.full_like(l, 0.0) + alpha, sums)

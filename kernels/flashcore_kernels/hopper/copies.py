"""What producers and consumers do around the copy engine: scrub what it brought, and say who is done with a buffer."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .visible import BITMAP


@gluon.jit
def release(empty):
    """Arrive at `empty`, each of the partition's threads for itself.

    `mbarrier.arrive` would arrive once, behind a barrier of the partition. What stands here arrives when all that the
    thread copies asynchronously is there. A consumer's thread copies nothing, so it arrives at once.
    """
    async_copy.mbarrier_arrive(empty, increment_count=False)


@gluon.jit(noinline=True)
def unseen(memory):
    """The same shared memory, as something that Triton knows nothing of.

    What it hides: between two waits for one array of barriers Triton puts a barrier of the partition. That is for
    threads which sleep through two phases of an mbarrier. It would stand in each block, and two consumers of one
    partition would wait for each other there.

    Why it may be left out: no thread can sleep through two phases here, because each arrives for itself. A phase ends
    only when every thread has arrived. (For the queries' barrier, a thread arrives after it has read the next position,
    see hand_out.)

    Triton keeps the memory for as long as it sees it used, and the producer uses the memory itself. Nothing is called
    in the end: LLVM inlines this.
    """
    return memory


@gluon.jit
def write_seen_keys(
    Range, keep, b, m0, n, lo, hi, visibility, BM: gl.constexpr, BN: gl.constexpr, RANGE: gl.constexpr,
    WARPS: gl.constexpr = 1,
):  # fmt: skip
    """Write to `keep` int32 `[BN]` which keys of the block exist and are seen by a row of the tile."""
    cols = n + gl.arange(0, BN, gl.BlockedLayout([1], [32], [WARPS], [0]))
    inside = (cols >= lo) & (cols < hi)
    if RANGE == 1:
        bitmap = Range + b.to(gl.int64) * visibility.stride_rb + BITMAP
        word = gl.load(bitmap + (cols >> 5), mask=inside, other=0)
        seen = (word >> (cols & 31)) & 1
    else:
        seen = gl.zeros_like(cols)
        for row in range(m0, gl.minimum(m0 + BM, visibility.num_queries)):
            line = Range + b.to(gl.int64) * visibility.stride_rb + row.to(gl.int64) * visibility.stride_rs
            row_lo = gl.load(line)
            row_hi = gl.load(line + 1)
            seen = seen | ((cols >= row_lo) & (cols < row_hi)).to(gl.int32)
    keep.store(gl.where(inside, seen, 0))


@gluon.jit
def scrub(values, keep, n, lo, hi, any_key, BN: gl.constexpr, DV: gl.constexpr, WARPS: gl.constexpr = 1):
    """Zero the rows of `values` `[BN, DV]` that nobody sees: they may hold NaN, and 0 * NaN is NaN.

    Args:
        keep: see `write_seen_keys`, read where `any_key` holds.
        n: key of the first row.
        lo, hi: keys outside of [lo, hi) are seen by nobody.
        any_key: a key between them may be seen by nobody, too.
        WARPS: of the partition.
    """
    # 8 rows of 128 bytes a warp at a time: that is the unit of the swizzle, and what a warp's few registers hold.
    EIGHTS: gl.constexpr = 8 * WARPS
    WIDE: gl.constexpr = 64 if DV >= 64 else DV
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDE, WIDE // 8], [WARPS, 1], [1, 0])
    for c in gl.static_range(0, BN, EIGHTS):
        if any_key | (n + c < lo) | (n + c + EIGHTS > hi):
            keys = n + c + gl.arange(0, EIGHTS, gl.SliceLayout(1, LAYOUT))
            seen = (keys >= lo) & (keys < hi)
            if any_key:
                seen = seen & (keep.slice(c, EIGHTS).load(gl.SliceLayout(1, LAYOUT)) != 0)
            for d in gl.static_range(0, DV, WIDE):
                part = values.slice(c, EIGHTS).slice(d, WIDE, dim=1)
                rows = part.load(LAYOUT)
                part.store(gl.where(seen[:, None], rows, gl.zeros_like(rows)))

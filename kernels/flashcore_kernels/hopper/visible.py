"""Which keys a tile of queries sees, from the arguments or a KeyRange: the same for the producer and the consumers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Words of a KeyRange line; key_range.py owns the layout, tests compare the two.
FIRST = gl.constexpr(0)
END = gl.constexpr(1)
QUERY_START = gl.constexpr(2)
LEFT = gl.constexpr(3)
RIGHT = gl.constexpr(4)
HOLES = gl.constexpr(5)
BITMAP = gl.constexpr(6)

# Further than any two keys are apart, and small enough that sums of two stay in int32.
FAR = gl.constexpr(1 << 29)


@gluon.jit
def sequence_bounds(Range, b, numbers, RANGE: gl.constexpr):
    """One sequence's (first, end, slot of query 0, left, right, holes), as `blocks.sequence_bounds`."""
    num_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rs = numbers
    if RANGE == 1:
        line = Range + b.to(gl.int64) * stride_rb
        # Clamped, so that a wrong KeyRange can hide keys but never read outside of the tensors.
        first = gl.maximum(gl.load(line + FIRST), 0)
        end = gl.minimum(gl.load(line + END), num_keys)
        start = gl.load(line + QUERY_START)
        left = gl.load(line + LEFT)
        right = gl.load(line + RIGHT)
        holes = gl.load(line + HOLES)
    else:
        first = num_keys * 0
        end = num_keys
        start = query_start
        left = window_left
        right = window_right
        holes = first
    left = gl.where(left < 0, FAR, gl.minimum(left, FAR))
    right = gl.where(right < 0, FAR, gl.minimum(right, FAR))
    return first, end, start, left, right, holes


@gluon.jit
def row_ranges(Range, b, rows, numbers):
    """(first, end) of the keys that each of `rows` sees, from a KeyRange of the `rows` layout."""
    num_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rs = numbers
    valid = rows < num_queries
    line = Range + b.to(gl.int64) * stride_rb + rows.to(gl.int64) * stride_rs
    row_lo = gl.maximum(gl.load(line, mask=valid, other=0), 0)
    row_hi = gl.minimum(gl.load(line + 1, mask=valid, other=0), num_keys)
    return row_lo, row_hi


@gluon.jit
def tile_keys(Range, b, m0, sequence, numbers, BM: gl.constexpr, RANGE: gl.constexpr, WARPS: gl.constexpr):
    """Keys [lo, hi) are seen by some row of the tile."""
    num_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rs = numbers
    first, end, start, left, right, holes = sequence
    if RANGE == 2:
        ROWS: gl.constexpr = BM if BM & (BM - 1) == 0 else 256
        rows = gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [WARPS], [0]))
        row_lo, row_hi = row_ranges(Range, b, m0 + rows, numbers)
        some = (rows < BM) & (row_lo < row_hi)
        lo = gl.min(gl.where(some, row_lo, num_keys), axis=0)
        hi = gl.max(gl.where(some, row_hi, 0), axis=0)
    else:
        last = gl.minimum(m0 + BM, num_queries) - 1
        lo = gl.maximum(first, start + m0 - left)
        hi = gl.minimum(end, start + last + right + 1)
    return lo, hi


@gluon.jit
def tile_blocks(first, lo, hi, num_keys, BN: gl.constexpr):
    """First key of the first block of a tile that sees keys [lo, hi), and how many blocks it visits: at least one.

    Blocks lie on a grid that starts at the sequence's first key, so that padding does not move them. A tile that sees
    nothing visits the block behind the last key: the copy engine fills that with zeros.
    """
    begin = first + gl.maximum(lo - first, 0) // BN * BN
    count = gl.where(lo < hi, (hi - begin + BN - 1) // BN, 0)
    return gl.where(count > 0, begin, num_keys), gl.maximum(count, 1)


@gluon.jit
def may_have_gaps(Range, b, m0, numbers, BM: gl.constexpr):
    """Whether keys between the first and the last that the tile's rows see may be seen by none of them.

    They are not where each row's range touches the next row's.
    """
    num_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rs = numbers
    ROWS: gl.constexpr = BM if BM & (BM - 1) == 0 else 256
    rows = gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [1], [0]))
    lo, hi = row_ranges(Range, b, m0 + rows, numbers)
    next_lo, next_hi = row_ranges(Range, b, m0 + rows + 1, numbers)
    pair = (rows < BM - 1) & (m0 + rows + 1 < num_queries)
    touch = (lo < hi) & (next_lo < next_hi) & (next_lo <= hi) & (lo <= next_hi)
    return gl.max((pair & (touch == 0)).to(gl.int32), axis=0) != 0

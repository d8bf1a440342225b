"""Which keys a tile of queries sees, from the arguments or a KeyRange: the same for the producer and the consumers."""

from typing import NamedTuple

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


class Visibility(NamedTuple):
    """What a call says of the keys that queries see. All are int32, the same for all sequences.

    Attributes:
        num_queries, num_keys: of a sequence.
        query_start: key slot at which query 0 stands; read where there is no KeyRange.
        window_left, window_right: how many keys before and behind its own slot a query sees, negative: all of them;
            read where there is no KeyRange.
        stride_rb, stride_rs: int32 words from one sequence's line of the KeyRange to the next, and, in the layout with
            a line a query, from one query's to the next.
    """

    num_queries: gl.tensor
    num_keys: gl.tensor
    query_start: gl.tensor
    window_left: gl.tensor
    window_right: gl.tensor
    stride_rb: gl.tensor
    stride_rs: gl.tensor


class SequenceBounds(NamedTuple):
    """The keys that one sequence has, and what its queries see of them. All are int32.

    Attributes:
        first, end: its keys are [first, end).
        start: key slot at which its query 0 stands.
        left, right: how many keys before and behind its own slot a query sees; at most `FAR`.
        holes: not 0: only those keys exist whose bit in the KeyRange's bitmap is 1.
    """

    first: gl.tensor
    end: gl.tensor
    start: gl.tensor
    left: gl.tensor
    right: gl.tensor
    holes: gl.tensor


@gluon.jit
def sequence_bounds(Range, b, visibility, RANGE: gl.constexpr):
    """The SequenceBounds of sequence b, as `blocks.sequence_bounds`.

    Args:
        Range: the KeyRange, looked at with `RANGE == 1` alone: a line a sequence.
        visibility: a Visibility.
    """
    num_keys = visibility.num_keys
    if RANGE == 1:
        line = Range + b.to(gl.int64) * visibility.stride_rb
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
        start = visibility.query_start
        left = visibility.window_left
        right = visibility.window_right
        holes = first
    left = gl.where(left < 0, FAR, gl.minimum(left, FAR))
    right = gl.where(right < 0, FAR, gl.minimum(right, FAR))
    return SequenceBounds(first=first, end=end, start=start, left=left, right=right, holes=holes)


@gluon.jit
def row_ranges(Range, b, rows, visibility):
    """(first, end) of the keys that each of `rows` sees, from a KeyRange with a line a query."""
    valid = rows < visibility.num_queries
    line = Range + b.to(gl.int64) * visibility.stride_rb + rows.to(gl.int64) * visibility.stride_rs
    row_lo = gl.maximum(gl.load(line, mask=valid, other=0), 0)
    row_hi = gl.minimum(gl.load(line + 1, mask=valid, other=0), visibility.num_keys)
    return row_lo, row_hi


@gluon.jit
def tile_keys(Range, b, m0, bounds, visibility, BM: gl.constexpr, RANGE: gl.constexpr, WARPS: gl.constexpr):
    """(lo, hi): the keys [lo, hi) are seen by some row of the tile of BM rows from m0 on."""
    if RANGE == 2:
        ROWS: gl.constexpr = BM if BM & (BM - 1) == 0 else 256
        rows = gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [WARPS], [0]))
        row_lo, row_hi = row_ranges(Range, b, m0 + rows, visibility)
        some = (rows < BM) & (row_lo < row_hi)
        lo = gl.min(gl.where(some, row_lo, visibility.num_keys), axis=0)
        hi = gl.max(gl.where(some, row_hi, 0), axis=0)
    else:
        last = gl.minimum(m0 + BM, visibility.num_queries) - 1
        lo = gl.maximum(bounds.first, bounds.start + m0 - bounds.left)
        hi = gl.minimum(bounds.end, bounds.start + last + bounds.right + 1)
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
def may_have_gaps(Range, b, m0, visibility, BM: gl.constexpr):
    """Whether keys between the first and the last that the tile's rows see may be seen by none of them.

    They are not where each row's range touches the next row's.
    """
    ROWS: gl.constexpr = BM if BM & (BM - 1) == 0 else 256
    rows = gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [1], [0]))
    lo, hi = row_ranges(Range, b, m0 + rows, visibility)
    next_lo, next_hi = row_ranges(Range, b, m0 + rows + 1, visibility)
    pair = (rows < BM - 1) & (m0 + rows + 1 < visibility.num_queries)
    touch = (lo < hi) & (next_lo < next_hi) & (next_lo <= hi) & (lo <= next_hi)
    return gl.max((pair & (touch == 0)).to(gl.int32), axis=0) != 0

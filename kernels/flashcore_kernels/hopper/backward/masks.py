"""Which queries see a block of keys, and what of a block is hidden, from the arguments or a KeyRange.

Keys lie on a grid of blocks that starts at the sequence's first key, queries on one that starts at the query standing
at that key. So padding moves no block, and a sequence's sums are added up in the same pieces with and without it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..visible import BITMAP


@gluon.jit
def missing(distance, BLOCK: gl.constexpr):
    """How much of the first block lies before index 0, on a grid with a block boundary at `distance` >= 0."""
    return (BLOCK - distance % BLOCK) % BLOCK


@gluon.jit
def query_shift(sequence, BM: gl.constexpr):
    """Query 0 is at this place of its block of BM queries."""
    first, end, start, left, right, holes = sequence
    return missing(gl.maximum(first - start, 0), BM)


@gluon.jit
def first_key(sequence, tile, BN: gl.constexpr):
    """The first key of a head's block of this number. It may be negative: then the first keys of it do not exist."""
    first, end, start, left, right, holes = sequence
    return tile * BN - missing(first, BN)


@gluon.jit
def query_blocks(sequence, n0, num_queries, BM: gl.constexpr, BN: gl.constexpr):
    """(first, behind the last) of the blocks of queries that see some of the keys [n0, n0 + BN)."""
    first, end, start, left, right, holes = sequence
    shift = query_shift(sequence, BM)
    n_lo = gl.maximum(n0, first)
    n_hi = gl.minimum(n0 + BN, end)
    lo = gl.maximum(n_lo - right - start, 0)
    hi = gl.minimum(n_hi + left - start, num_queries)
    some = (n_lo < n_hi) & (lo < hi)
    begin = gl.where(some, (lo + shift) // BM, 0)
    return begin, gl.where(some, (hi + shift + BM - 1) // BM, 0)


@gluon.jit
def whole_blocks(sequence, k0, BM: gl.constexpr, KEYS: gl.constexpr):
    """(first, behind the last) of the blocks whose queries all see all of those keys [k0, k0 + KEYS) that exist."""
    first, end, start, left, right, holes = sequence
    shift = query_shift(sequence, BM)
    begin = (gl.maximum(k0 + KEYS - 1 - right - start + shift, 0) + BM - 1) // BM
    return begin, gl.maximum(k0 + 1 + left - start + shift, 0) // BM


@gluon.jit
def keep_columns(p, n, lo, hi):
    """`p` `[rows, columns]`, zero where column n + i is not in its row's [lo, hi) `[rows]`.

    A thread has the columns 8 * i + 2 * lane + j of its rows. Its own part of that is taken from the bounds, so that
    they are compared with constants: that takes half of the instructions.

    P is hidden, not the scores: the branch that this stands in reads P. So ptxas cannot move exponentials over it,
    behind the wait for a product beside which they are to run.
    """
    COLUMNS: gl.constexpr = p.shape[1]
    parts = p.reshape([p.shape[0], COLUMNS // 8, 4, 2])
    LAYOUT: gl.constexpr = parts.type.layout
    ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT)))
    i = gl.arange(0, COLUMNS // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))))
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT))))
    j = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))))
    column = 8 * i[None, :, None, None] + j[None, None, None, :]
    first = 2 * lane[None, None, :, None]
    lo = gl.convert_layout(lo - n, ROWS)[:, None, None, None] - first
    hi = gl.convert_layout(hi - n, ROWS)[:, None, None, None] - first
    parts = gl.where((column >= lo) & (column < hi), parts, 0.0)
    return gl.convert_layout(parts.reshape([p.shape[0], COLUMNS]), p.type.layout)


@gluon.jit
def keep_queries(p, sequence, k0, m):
    """P^T `[keys, queries]`, zero where a query stands too far from a key to see it.

    Keys that do not exist are left: their rows are their own, and are not written.
    """
    first, end, start, left, right, holes = sequence
    keys = k0 + gl.arange(0, p.shape[0], gl.SliceLayout(1, p.type.layout))
    return keep_columns(p, m, keys - right - start, keys + left - start + 1)


@gluon.jit
def keep_keys(p, n, row_lo, row_hi, line, holes, num_keys, RANGE: gl.constexpr):
    """P `[queries, keys]`, zero where a query does not see a key."""
    p = keep_columns(p, n, row_lo, row_hi)
    if RANGE == 1:
        if holes != 0:
            columns = n + gl.arange(0, p.shape[1], gl.SliceLayout(0, p.type.layout))
            word = gl.load(line + BITMAP + (columns >> 5), mask=columns < num_keys, other=0)
            p = gl.where((((word >> (columns & 31)) & 1) == 1)[None, :], p, 0.0)
    return p


@gluon.jit
def seen_keys(sequence, line, keys, num_queries, num_keys, RANGE: gl.constexpr):
    """Which of `keys` exist and are seen by some query."""
    first, end, start, left, right, holes = sequence
    seen = (keys >= first) & (keys < end) & (keys >= start - left) & (keys < start + num_queries + right)
    if RANGE == 1:
        if holes != 0:
            word = gl.load(line + BITMAP + (keys >> 5), mask=(keys >= 0) & (keys < num_keys), other=0)
            seen = seen & (((word >> (keys & 31)) & 1) == 1)
    return seen

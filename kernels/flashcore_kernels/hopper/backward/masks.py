"""Which queries see a block of keys, and what of a block is hidden, from a sequence's SequenceBounds.

Keys lie on a grid of blocks that starts at the sequence's first key, queries on one that starts at the query standing
at that key. So padding moves no block, and a sequence's sums are added up in the same pieces with and without it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..visible import BITMAP

# Keys of a consumer of `dkdv`, and of a span (see spans.py).
KEYS = gl.constexpr(64)


@gluon.jit
def missing(distance, BLOCK: gl.constexpr):
    """How much of the first block lies before index 0, on a grid with a block boundary at `distance` >= 0."""
    return (BLOCK - distance % BLOCK) % BLOCK


@gluon.jit
def query_shift(bounds, BM: gl.constexpr):
    """Query 0 is at this place of its block of BM queries."""
    return missing(gl.maximum(bounds.first - bounds.start, 0), BM)


@gluon.jit
def first_key(bounds, tile, BN: gl.constexpr):
    """The first key of a head's block of this number. It may be negative: then the first keys of it do not exist."""
    return tile * BN - missing(bounds.first, BN)


@gluon.jit
def query_blocks(bounds, n0, num_queries, BM: gl.constexpr, BN: gl.constexpr):
    """(first, behind the last) of the blocks of queries that see some of the keys [n0, n0 + BN)."""
    shift = query_shift(bounds, BM)
    n_lo = gl.maximum(n0, bounds.first)
    n_hi = gl.minimum(n0 + BN, bounds.end)
    lo = gl.maximum(n_lo - bounds.right - bounds.start, 0)
    hi = gl.minimum(n_hi + bounds.left - bounds.start, num_queries)
    some = (n_lo < n_hi) & (lo < hi)
    begin = gl.where(some, (lo + shift) // BM, 0)
    return begin, gl.where(some, (hi + shift + BM - 1) // BM, 0)


@gluon.jit
def seeing_queries(bounds):
    """(first, behind the last) of the queries that see some of the sequence's keys, where it has no holes.

    They may be beyond the queries that there are.
    """
    return bounds.first - bounds.right - bounds.start, bounds.end + bounds.left - bounds.start


@gluon.jit
def whole_blocks(bounds, k0, BM: gl.constexpr, KEYS: gl.constexpr):
    """(first, behind the last) of the blocks whose queries all see all of those keys [k0, k0 + KEYS) that exist."""
    shift = query_shift(bounds, BM)
    begin = (gl.maximum(k0 + KEYS - 1 - bounds.right - bounds.start + shift, 0) + BM - 1) // BM
    return begin, gl.maximum(k0 + 1 + bounds.left - bounds.start + shift, 0) // BM


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
def keep_queries(p, bounds, k0, m):
    """P^T `[keys, queries]` of the keys from k0 and the queries from m on, zero where these stand too far apart.

    Keys that do not exist are left: their rows are their own, and are not written.
    """
    keys = k0 + gl.arange(0, p.shape[0], gl.SliceLayout(1, p.type.layout))
    first = keys - bounds.right - bounds.start
    return keep_columns(p, m, first, keys + bounds.left - bounds.start + 1)


@gluon.jit
def keep_ranges(p, lo_smem, hi_smem, k0):
    """P^T `[keys, queries]` of the keys from k0 on, zero where a key is not in the query's [lo, hi) `[queries]`."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, p.type.layout)
    keys = (k0 + gl.arange(0, p.shape[0], gl.SliceLayout(1, p.type.layout)))[:, None]
    # One after the other: both together are 64 registers, of 128 queries.
    p = gl.where(keys >= lo_smem.load(COLUMNS)[None, :], p, 0.0)
    return gl.where(keys < hi_smem.load(COLUMNS)[None, :], p, 0.0)


@gluon.jit
def keep_keys(p, n, tile, line, num_keys, RANGE: gl.constexpr):
    """P `[queries, keys]` of the keys from n on, zero where a query does not see a key.

    Args:
        tile: a Tile.
        line: the sequence's of the KeyRange, looked at where the tile has holes.
    """
    p = keep_columns(p, n, tile.row_lo, tile.row_hi)
    if RANGE == 1:
        if tile.holes != 0:
            columns = n + gl.arange(0, p.shape[1], gl.SliceLayout(0, p.type.layout))
            word = gl.load(line + BITMAP + (columns >> 5), mask=columns < num_keys, other=0)
            p = gl.where((((word >> (columns & 31)) & 1) == 1)[None, :], p, 0.0)
    return p


@gluon.jit
def seen_keys(bounds, line, keys, visibility, RANGE: gl.constexpr):
    """Which of `keys` exist and are seen by some query."""
    seen = (keys >= bounds.first) & (keys < bounds.end)
    seen = seen & (keys >= bounds.start - bounds.left) & (keys < bounds.start + visibility.num_queries + bounds.right)
    if RANGE == 1:
        if bounds.holes != 0:
            inside = (keys >= 0) & (keys < visibility.num_keys)
            word = gl.load(line + BITMAP + (keys >> 5), mask=inside, other=0)
            seen = seen & (((word >> (keys & 31)) & 1) == 1)
    return seen


@gluon.jit
def span_of(call, b, key):
    """Address of what `flashcore_hopper_backward_spans` says of the 64 keys among which this one is."""
    spans = (call.visibility.num_keys + KEYS - 1) // KEYS
    # A tile of more may end behind them.
    return call.pointers.spans + (b.to(gl.int64) * (spans + 1) + gl.minimum(key // KEYS, spans)) * 8


@gluon.jit
def seen_of_span(call, b, keys):
    """Which of `keys` some query sees, or do not exist."""
    bits = gl.load(span_of(call, b, keys) + 4 + keys % KEYS // 32)
    return ((bits >> (keys & 31)) & 1) == 1


@gluon.jit
def any_unseen(call, b, begin, end):
    """Whether there is a key in the spans of [begin, end) that no query sees: a warp looks at 32 spans at once."""
    lanes = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0])) * KEYS
    some = begin * 0
    # From the first of its span on: in steps from within it, the last would be a part of one too short.
    for key in range(begin // KEYS * KEYS, end, 32 * KEYS):
        span = span_of(call, b, gl.minimum(key + lanes, end - 1))
        some = some | gl.max(((gl.load(span + 4) & gl.load(span + 5)) != -1).to(gl.int32), axis=0)
    return some != 0

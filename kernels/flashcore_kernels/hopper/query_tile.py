"""A tile of queries as each partition of consumers sees it, and the blocks of it that it leaves to others."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .copies import release
from .records import Tile
from .visible import row_ranges, sequence_bounds, tile_blocks, tile_keys


@gluon.jit
def tile_of(position, call, CONSUMER: gl.constexpr, C: gl.constexpr, FROM_FIRST: gl.constexpr = True):
    """The Tile at this TilePosition, as partition CONSUMER of its program sees it. Any tile where there is none.

    Args:
        FROM_FIRST: blocks lie on a grid that starts at the sequence's first key; otherwise at key 0.
    """
    BN: gl.constexpr = C.block_n
    BM: gl.constexpr = 64 * C.consumers
    ROWS: gl.constexpr = C.rows
    WARPS: gl.constexpr = C.warps
    RANGE: gl.constexpr = C.range_layout
    ROWS_LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16]))
    Range = call.pointers.key_range
    visibility = call.visibility
    num_queries = visibility.num_queries
    num_keys = visibility.num_keys
    b, h, tile = position
    head_of_all = b * call.heads.num_heads + h
    m0 = gl.maximum(tile, 0) * BM
    r0 = m0 + CONSUMER * ROWS
    rows = r0 + gl.arange(0, ROWS, ROWS_LAYOUT)
    bounds = sequence_bounds(Range, b, visibility, RANGE)
    first, end, start, left, right, holes = bounds
    tile_lo, tile_hi = tile_keys(Range, b, m0, bounds, visibility, BM, RANGE, WARPS)
    begin, blocks = tile_blocks(first if FROM_FIRST else 0, tile_lo, tile_hi, num_keys, BN)
    # Keys before hi are seen by some of this partition's rows, keys [full_lo, full_hi) by all of them.
    if RANGE == 2:
        row_lo, row_hi = row_ranges(Range, b, rows, visibility)
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
    own_blocks = gl.minimum(gl.maximum((hi - begin + BN - 1) // BN, 1), blocks)
    left_edge = gl.minimum(gl.maximum((full_lo - begin + BN - 1) // BN, 0), own_blocks)
    right_edge = gl.maximum(gl.minimum(gl.maximum(full_hi - begin, 0) // BN, own_blocks), left_edge)
    if RANGE == 1:
        left_edge = gl.where(holes != 0, own_blocks, left_edge)
        right_edge = gl.where(holes != 0, own_blocks, right_edge)
    return Tile(
        b=b, h=h, head_of_all=head_of_all, r0=r0, begin=begin, blocks=blocks, own_blocks=own_blocks,
        left_edge=left_edge, right_edge=right_edge, row_lo=row_lo, row_hi=row_hi, holes=holes,
    )  # fmt: skip


@gluon.jit
def pass_over_blocks(use, tile, barriers, C: gl.constexpr):
    """Release the blocks that only other consumers see. Not before they are full: it would count for older ones."""
    for _ in range(tile.own_blocks, tile.blocks):
        stage = use % C.stages
        mbarrier.wait(barriers.k_full.index(stage), use // C.stages & 1)
        release(barriers.k_empty.index(stage))
        mbarrier.wait(barriers.v_full.index(stage), use // C.stages & 1)
        release(barriers.v_empty.index(stage))
        use += 1
    return use

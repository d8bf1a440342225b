"""A tile of `dkdv`, as the producer and both consumers see it."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..visible import sequence_bounds
from .masks import first_key, query_blocks
from .records import KeyTile

# Keys of a consumer, and of a tile.
KEYS = gl.constexpr(64)
BLOCK_N = gl.constexpr(128)


@gluon.jit
def key_tile(position, call, C: gl.constexpr):
    """The KeyTile at this TilePosition. Any tile where there is none."""
    b, kv_head, number = position
    bounds = sequence_bounds(call.pointers.key_range, b, call.visibility, C.range_layout)
    # The keys that most queries see first, under causal attention: `position_of` numbers the other way round.
    n0 = first_key(bounds, call.order.tiles_per_head - 1 - gl.maximum(number, 0), BLOCK_N)
    begin, end = query_blocks(bounds, n0, call.visibility.num_queries, C.block_m, BLOCK_N)
    return KeyTile(b=b, kv_head=kv_head, n0=n0, begin=begin, end=end, bounds=bounds)

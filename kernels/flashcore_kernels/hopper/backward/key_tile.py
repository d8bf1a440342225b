"""A tile of `dkdv`, as the producer and both consumers see it."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..visible import sequence_bounds
from .masks import KEYS, first_key, query_blocks, span_of, whole_blocks
from .records import KeyTile


@gluon.jit
def blocks_of_keys(call, b, k0, bounds, C: gl.constexpr):
    """(begin, end, whole_begin, whole_end) of a consumer's keys from k0 on.

    The blocks of queries [begin, end) see some of them, and none does where end <= begin. In those of [whole_begin,
    whole_end) nothing is hidden.
    """
    if C.range_layout == 2:
        span = span_of(call, b, k0)
        begin = gl.load(span)
        end = gl.load(span + 1)
        whole_begin = gl.load(span + 2)
        whole_end = gl.load(span + 3)
    else:
        begin, end = query_blocks(bounds, k0, call.visibility.num_queries, C.block_m, KEYS)
        whole_begin, whole_end = whole_blocks(bounds, k0, C.block_m, KEYS)
    return begin, end, whole_begin, whole_end


@gluon.jit
def key_tile(position, call, C: gl.constexpr):
    """The KeyTile at this TilePosition. Any tile where there is none."""
    b, kv_head, number = position
    bounds = sequence_bounds(call.pointers.key_range, b, call.visibility, C.range_layout)
    # The keys that most queries see first, under causal attention: `position_of` numbers the other way round.
    n0 = first_key(bounds, call.order.tiles_per_head - 1 - gl.maximum(number, 0), C.tile_keys)
    if C.range_layout == 2:
        begin, end, _, _ = blocks_of_keys(call, b, n0, bounds, C)
        if C.tile_keys > KEYS:
            other_begin, other_end, _, _ = blocks_of_keys(call, b, n0 + KEYS, bounds, C)
            end = gl.maximum(end, other_end)
            begin = gl.minimum(begin, other_begin)
        begin = gl.minimum(begin, end)
    else:
        begin, end = query_blocks(bounds, n0, call.visibility.num_queries, C.block_m, C.tile_keys)
    return KeyTile(b=b, kv_head=kv_head, n0=n0, begin=begin, end=end, bounds=bounds)

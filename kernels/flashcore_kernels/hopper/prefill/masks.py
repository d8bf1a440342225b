"""Dense masks and biases in the prefill's warps, by the map that `mask_map` made of them.

A tile's blocks are those of its line: the ones in which the mask shows a query some key. They lie on a grid that starts
at key 0. What a KeyRange, a window or causal attention leave of them is between two places in that list.

A bool mask comes as bits: 16 bytes hold a row's bits of a block, so a thread loads two vectors of them, and they are on
their way while the block's scores are computed. A bias comes in tiles of 64 queries by the copy engine, to each
consumer's own buffer, which is free again as soon as the bias is in the scores. One that all queries share is loaded
straight to registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..copies import release, write_seen_keys
from ..query_tile import tile_of
from ..records import Tile
from ..rows import LOG2_E
from ..triton_api import tma_load
from ..visible import row_ranges
from .mask_map import FAR_BIAS as _FAR_BIAS
from .mask_map import FLAGS as _FLAGS
from .mask_map import GAPS as _GAPS
from .mask_map import HIDES as _HIDES
from .mask_map import READ as _READ

READ, HIDES, GAPS, FAR_BIAS, FLAGS = (
    gl.constexpr(flag.value) for flag in (_READ, _HIDES, _GAPS, _FAR_BIAS, _FLAGS)
)  # fmt: skip
# `PrefillConstants.mask`.
NO_MASK, BOOL, BIAS, BIAS_ROW = (gl.constexpr(kind) for kind in range(4))
# A bias counts as no less than this, in units of log2, unless it is -inf: -inf would hide the key.
LEAST_BIAS = gl.constexpr(-3e38)


@gluon.jit
def _line(mask, b, h, tile):
    """Address of a tile's line."""
    number = b.to(gl.int64) * mask.line_b + h.to(gl.int64) * mask.line_h + tile.to(gl.int64) * mask.line_t
    return mask.lines + number * (2 * mask.num_blocks + 2)


@gluon.jit
def block_list(mask, b, h, tile):
    """Address of a tile's list of blocks."""
    return _line(mask, b, h, tile) + mask.num_blocks + 1


@gluon.jit
def listed_blocks(mask, b, h, tile, begin, count, BN: gl.constexpr):
    """(place of the first in a tile's list, how many) of `count` blocks from key `begin` on: at least one.

    A tile that sees nothing gets what is behind the last of the list: the block behind the last key.
    """
    line = _line(mask, b, h, tile)
    first = gl.minimum(begin // BN, mask.num_blocks)
    last = gl.minimum(first + count, mask.num_blocks)
    place = gl.load(line + first)
    listed = gl.load(line + last) - place
    return gl.where(listed > 0, place, gl.load(line + mask.num_blocks)), gl.maximum(listed, 1)


@gluon.jit
def listed_tile_of(position, call, CONSUMER: gl.constexpr, C: gl.constexpr):
    """`tile_of`, with blocks that are those of the tile's list. `begin` is the place of the first in that list."""
    BN: gl.constexpr = C.block_n
    mask = call.mask
    tile = tile_of(position, call, CONSUMER, C, False)
    number = gl.maximum(position.tile, 0)
    line = _line(mask, tile.b, tile.h, number)
    place, blocks = listed_blocks(mask, tile.b, tile.h, number, tile.begin, tile.blocks, BN)
    first = gl.minimum(tile.begin // BN, mask.num_blocks)
    base = gl.load(line + first)
    own_end = gl.load(line + gl.minimum(first + tile.own_blocks, mask.num_blocks))
    left_end = gl.load(line + gl.minimum(first + tile.left_edge, mask.num_blocks))
    right_begin = gl.load(line + gl.minimum(first + tile.right_edge, mask.num_blocks))
    # Where all of a partition's blocks are left out it still visits one, as one at the edge.
    own_blocks = gl.minimum(gl.maximum(own_end - base, 1), blocks)
    left_edge = gl.minimum(left_end - base, own_blocks)
    right_edge = gl.maximum(gl.minimum(right_begin - base, own_blocks), left_edge)
    return Tile(
        b=tile.b, h=tile.h, head_of_all=tile.head_of_all, r0=tile.r0, begin=place, blocks=blocks,
        own_blocks=own_blocks, left_edge=left_edge, right_edge=right_edge, row_lo=tile.row_lo, row_hi=tile.row_hi,
        holes=tile.holes,
    )  # fmt: skip


@gluon.jit
def _parts(s):
    """s `[rows, N]` as `[rows, N / 32, 4, 4, 2]`: a word of bits, an eight of it, a lane, two neighbours."""
    return s.reshape([s.shape[0], s.shape[1] // 32, 4, 4, 2])


@gluon.jit
def mask_ahead(entry, tile, call, C: gl.constexpr):
    """What can be loaded of a block's mask before its scores are there: of a bool mask int32 `[rows, N / 32]`.

    Args:
        entry: of the tile's list.
    """
    BN: gl.constexpr = C.block_n
    ROWS: gl.constexpr = C.rows
    WARPS: gl.constexpr = C.warps
    mask = call.mask
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    if C.mask == BOOL:
        parts = _parts(gl.zeros([ROWS, BN], gl.float32, S_LAYOUT))
        LAYOUT: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, parts.type.layout)))
        rows = tile.r0 + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        word = gl.arange(0, BN // 32, gl.SliceLayout(0, LAYOUT))
        at = tile.b.to(gl.int64) * mask.row_b + tile.h.to(gl.int64) * mask.row_h + rows.to(gl.int64) * mask.row_q
        at = at * mask.num_blocks + entry // FLAGS
        wanted = (rows < call.visibility.num_queries) & ((entry & READ) != 0)
        ahead = gl.load(
            mask.bits + (at * (BN // 32))[:, None] + word[None, :], mask=wanted[:, None], other=-1
        )  # fmt: skip
    elif C.mask == BIAS_ROW:
        cols = entry // FLAGS * BN + gl.arange(0, BN, gl.SliceLayout(0, S_LAYOUT))
        row = mask.bias + tile.b.to(gl.int64) * mask.bias_b + tile.h.to(gl.int64) * mask.bias_h
        wanted = (cols < call.visibility.num_keys) & ((entry & READ) != 0)
        ahead = gl.load(row + cols.to(gl.int64) * mask.bias_k, mask=wanted, other=0.0)
    else:
        ahead = entry
    return ahead


@gluon.jit
def _hide_by_bits(s, words):
    """-inf where the bit of a row and key is 0.

    A thread has the columns 8 * i + 2 * lane + j of each word, where i and j are known to the compiler. So words are
    moved by 2 * lane once, and then it is the same bits of each that are looked at.
    """
    parts = _parts(s)
    LAYOUT: gl.constexpr = parts.type.layout
    i = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, LAYOUT)))))
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, LAYOUT)))))
    j = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT)))))
    moved = words[:, :, None, None, None] >> (2 * lane)[None, None, None, :, None]
    looked_at = 1 << (8 * i[None, None, :, None, None] + j[None, None, None, None, :])
    parts = gl.where((moved & looked_at) != 0, parts, float("-inf"))
    return gl.convert_layout(parts.reshape([s.shape[0], s.shape[1]]), s.type.layout)


@gluon.jit
def _add(s, bias, entry):
    """s + bias, in units of log2, `[rows, N]`; a bias of -inf hides its key, whatever the key holds."""
    if (entry & (HIDES | FAR_BIAS)) != 0:
        seen = bias > float("-inf")
        s = gl.where(seen, s + gl.maximum(bias.to(gl.float32) * LOG2_E, LEAST_BIAS), float("-inf"))
    else:
        s = gl.fma(bias.to(gl.float32), gl.full_like(s, 0.0) + LOG2_E, s)
    return s


@gluon.jit
def _add_by_halves(s, bias, entry):
    """`_add` of a bias in shared memory, one half of the columns after the other: a thread has few registers left."""
    ROWS: gl.constexpr = s.shape[0]
    HALF: gl.constexpr = s.shape[1] // 2
    LAYOUT: gl.constexpr = s.type.layout
    left, right = gl.split(s.reshape([ROWS, 2, HALF]).permute((0, 2, 1)))
    left = _add(left, bias.slice(0, HALF, dim=1).load(left.type.layout), entry)
    right = _add(right, bias.slice(HALF, HALF, dim=1).load(right.type.layout), entry)
    return gl.convert_layout(gl.join(left, right).permute((0, 2, 1)).reshape([ROWS, 2 * HALF]), LAYOUT)


@gluon.jit
def masked(s, ahead, entry, use, tile, call, C: gl.constexpr):
    """A block's scores `[rows, N]` under the mask; with a bias they come and go in units of log2.

    Args:
        ahead: what `mask_ahead` loaded.
        use: how many blocks this partition has computed or passed over.
    """
    BN: gl.constexpr = C.block_n
    ROWS: gl.constexpr = C.rows
    if C.mask == BOOL:
        if (entry & READ) != 0:
            s = _hide_by_bits(s, ahead)
    elif C.mask == BIAS_ROW:
        if (entry & READ) != 0:
            s = _add(s, gl.zeros_like(s) + ahead.to(gl.float32)[None, :], entry)
    elif C.mask == BIAS:
        consumer = tile.r0 // C.rows % C.consumers
        mbarrier.wait(call.barriers.mask_full.index(consumer), use & 1)
        if (entry & READ) != 0:
            s = _add_by_halves(s, call.buffers.mask.index(consumer).reshape([ROWS, BN]), entry)
        release(call.barriers.mask_empty.index(consumer))
    return s


@gluon.jit
def pass_over_listed_blocks(use, tile, call, C: gl.constexpr):
    """`pass_over_blocks`, with the tiles of a bias: in the order in which the producer fetches them."""
    barriers = call.barriers
    consumer = tile.r0 // C.rows % C.consumers
    for _ in range(tile.own_blocks, tile.blocks):
        stage = use % C.stages
        mbarrier.wait(barriers.k_full.index(stage), use // C.stages & 1)
        release(barriers.k_empty.index(stage))
        mbarrier.wait(barriers.mask_full.index(consumer), use & 1)
        release(barriers.mask_empty.index(consumer))
        mbarrier.wait(barriers.v_full.index(stage), use // C.stages & 1)
        release(barriers.v_empty.index(stage))
        use += 1
    return use


@gluon.jit
def load_mask_tiles(call, b, h, m0, n, use, C: gl.constexpr):
    """The producer's part: copy a block of the bias to each consumer's buffer."""
    CONSUMERS: gl.constexpr = C.consumers
    BYTES: gl.constexpr = 64 * C.block_n * (call.buffers.mask.dtype.primitive_bitwidth // 8)
    for c in gl.static_range(CONSUMERS):
        mbarrier.wait(call.barriers.mask_empty.index(c), (use & 1) ^ 1)
        full = call.barriers.mask_full.index(c)
        mbarrier.expect(full, BYTES)
        at = [b * call.mask.bias_b, h * call.mask.bias_h, m0 + c * 64, n]
        tma_load(call.descriptors.mask, at, full, call.buffers.mask.index(c))


@gluon.jit
def write_left_keys(keep, entry, b, h, m0, lo, hi, any_key, bounds, call, BM: gl.constexpr, C: gl.constexpr):
    """Write to `keep` int32 `[BN]` which keys of a block exist and are left to a row of the tile by mask and range.

    Args:
        keep: where `any_key` holds, `write_seen_keys` is asked first.
        lo, hi: keys outside of [lo, hi) are seen by nobody.
        bounds: a SequenceBounds.
    """
    BN: gl.constexpr = C.block_n
    RANGE: gl.constexpr = C.range_layout
    WORDS: gl.constexpr = BN // 32
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, WORDS], [32, 1], [1, 1], [1, 0])
    KEYS: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mask = call.mask
    visibility = call.visibility
    Range = call.pointers.key_range
    n = entry // FLAGS * BN
    word = gl.arange(0, WORDS, gl.SliceLayout(0, LAYOUT))
    left = gl.zeros([WORDS], gl.int32, gl.SliceLayout(0, LAYOUT))
    for r in gl.static_range(0, BM, 32):
        rows = m0 + r + gl.arange(0, 32, gl.SliceLayout(1, LAYOUT))
        valid = rows < visibility.num_queries
        at = b.to(gl.int64) * mask.row_b + h.to(gl.int64) * mask.row_h + rows.to(gl.int64) * mask.row_q
        at = at * mask.num_blocks + entry // FLAGS
        bits = gl.load(mask.bits + (at * WORDS)[:, None] + word[None, :], mask=valid[:, None], other=0)
        if RANGE == 2:
            row_lo, row_hi = row_ranges(Range, b, rows, visibility)
        else:
            row_lo = gl.maximum(bounds.first, bounds.start + rows - bounds.left)
            row_hi = gl.minimum(bounds.end, bounds.start + rows + bounds.right + 1)
        # Of each word the bits from `low` on and before `high`.
        first_key = n + 32 * word
        low = gl.minimum(gl.maximum(row_lo[:, None] - first_key[None, :], 0), 32)
        high = gl.minimum(gl.maximum(row_hi[:, None] - first_key[None, :], 0), 32)
        inside = _ones(high) & (_ones(low) ^ -1)
        left = left | gl.reduce(bits & inside, 0, _either)
    cols = n + gl.arange(0, BN, KEYS)
    bit = gl.arange(0, 32, gl.SliceLayout(0, gl.BlockedLayout([1, 1], [1, 32], [1, 1], [1, 0])))
    spread = gl.convert_layout(left, gl.SliceLayout(1, gl.BlockedLayout([1, 1], [1, 32], [1, 1], [1, 0])))
    seen = gl.convert_layout(((spread[:, None] >> bit[None, :]) & 1).reshape([BN]), KEYS)
    if RANGE > 0:
        if any_key:
            write_seen_keys(Range, keep, b, m0, n, lo, hi, visibility, BM, BN, RANGE)
            seen = seen & keep.load(KEYS)
    keep.store(gl.where((cols >= lo) & (cols < hi), seen, 0))


@gluon.jit
def _either(a, b):
    return a | b


@gluon.jit
def _ones(count):
    """int32 whose `count` lowest bits are 1; count is 0 to 32."""
    return ((gl.full_like(count, 1).to(gl.int64) << count.to(gl.int64)) - 1).to(gl.int32)


@gluon.jit
def limits_rows(Range, b, m0, bounds, visibility, n, BM: gl.constexpr, BN: gl.constexpr, RANGE: gl.constexpr):
    """Whether the range, or what the arguments say, may hide a key of the block from some row of the tile."""
    if RANGE == 2:
        return n >= 0
    else:
        last = gl.minimum(m0 + BM, visibility.num_queries) - 1
        full_lo = gl.maximum(bounds.first, bounds.start + last - bounds.left)
        full_hi = gl.minimum(bounds.end, bounds.start + m0 + bounds.right + 1)
        return (n < full_lo) | (n + BN > full_hi)

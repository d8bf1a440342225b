"""Tiles of packed queries: sequences of any lengths in a row, told apart by sums of lengths in device memory.

The host knows no length, so it cannot number the tiles. The scheduler warp does, for each tile that its program draws:
it adds up the tiles of all sequences until it has passed the number. A program's first tile it tells like the others.

A tile has `C.rows` rows for each partition of consumers: query tokens, and for each of them `C.pack` heads of one KV
head. So a prompt's last tile is seldom half empty, and few of its rows look at keys behind their own.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .schedule import draw
from .triton_api import barrier
from .visible import FAR

# Sequences that the scheduler warp adds up at a time, four a thread.
SEQUENCES = gl.constexpr(128)
# PackedPositions in shared memory, and int32 words of each.
POSITIONS = gl.constexpr(3)
POSITION_WORDS = gl.constexpr(6)


class Packed(NamedTuple):
    """The sequences of a call. Integers are int32.

    Attributes:
        cu_queries: int32 `[S + 1]`: sequence s has queries [cu_queries[s], cu_queries[s + 1]).
        lengths: int32 `[S]`, keys of each sequence; with `C.cumulative` their sums, `[S + 1]`.
        num_sequences, num_tokens: S and T. Queries behind those of the last sequence are padding.
        units: `C.pack` heads each, of a token.
        window_left, window_right: how many keys before and behind its own a query sees, negative: all of them.
    """

    cu_queries: gl.tensor
    lengths: gl.tensor
    num_sequences: gl.tensor
    num_tokens: gl.tensor
    units: gl.tensor
    window_left: gl.tensor
    window_right: gl.tensor


class PackedPosition(NamedTuple):
    """Which tile: its sequence, unit of heads, and number within these. `tile` is -1 where there is none.

    Attributes:
        sequence: the padding is sequence S, without keys.
        unit: of `C.pack` heads.
        tile: of the sequence's queries, from the first on.
        first_token, num_queries, num_keys: of the sequence.
    """

    sequence: gl.tensor
    unit: gl.tensor
    tile: gl.tensor
    first_token: gl.tensor
    num_queries: gl.tensor
    num_keys: gl.tensor


class PackedTile(NamedTuple):
    """As `records.Tile`, of packed queries.

    Attributes:
        unit, first_token, num_queries: as of the PackedPosition.
        m0: the tile's first query, within its sequence.
        r0: first of the partition's rows, within the tile: row r is head r % C.pack of query m0 + r // C.pack.
    """

    unit: gl.tensor
    first_token: gl.tensor
    num_queries: gl.tensor
    m0: gl.tensor
    r0: gl.tensor
    begin: gl.tensor
    blocks: gl.tensor
    own_blocks: gl.tensor
    left_edge: gl.tensor
    right_edge: gl.tensor
    row_lo: gl.tensor
    row_hi: gl.tensor


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _position_of(number, packed, C: gl.constexpr):
    """(the PackedPosition of the tile of this number, how many tiles there are).

    Tiles of one sequence and unit follow each other, so that those in work at a time share keys in the L2; the last
    ones, which see most keys, come first, so that programs end with short ones. Sequences of one query have no tiles:
    they are a decode kernel's.
    """
    TOKENS: gl.constexpr = 64 * C.consumers // C.pack
    LAYOUT: gl.constexpr = gl.BlockedLayout([SEQUENCES // 32], [32], [1], [0])
    S = packed.num_sequences
    T = packed.num_tokens
    sequence = number * 0
    before = number * 0
    tiles = number * 0
    for first in range(0, S + 1, SEQUENCES):
        s = first + gl.arange(0, SEQUENCES, LAYOUT)
        begins = gl.load(packed.cu_queries + s, mask=s <= S, other=T)
        ends = gl.load(packed.cu_queries + s + 1, mask=s < S, other=T)
        queries = ends - begins
        own = gl.where((queries != 1) | (s >= S), (queries + TOKENS - 1) // TOKENS, 0) * packed.units
        through = tiles + gl.associative_scan(own, 0, _add)
        passed = through <= number
        sequence += gl.sum(passed.to(gl.int32), axis=0)
        before = gl.maximum(before, gl.max(gl.where(passed, through, 0), axis=0))
        tiles += gl.sum(own, axis=0)
    sequence = gl.minimum(sequence, S)
    there = sequence < S
    first_token = gl.load(packed.cu_queries + sequence)
    num_queries = gl.load(packed.cu_queries + sequence + 1, mask=there, other=T) - first_token
    num_keys = gl.load(packed.lengths + sequence + (1 if C.cumulative else 0), mask=there, other=0)
    if C.cumulative:
        num_keys -= gl.load(packed.lengths + sequence, mask=there, other=0)
    each = gl.maximum((num_queries + TOKENS - 1) // TOKENS, 1)
    within = number - before
    position = PackedPosition(
        sequence=sequence, unit=within // each, tile=gl.where(number < tiles, each - 1 - within % each, -1),
        first_token=first_token, num_queries=num_queries, num_keys=gl.maximum(num_keys, 0),
    )  # fmt: skip
    return position, tiles


@gluon.jit
def _tell(queue, told, position):
    """Write the program's tile number `told`, from 0 on."""
    empty = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    at = told % POSITIONS * POSITION_WORDS
    queue.positions.index(at).store(empty + position.sequence)
    queue.positions.index(at + 1).store(empty + position.unit)
    queue.positions.index(at + 2).store(empty + position.tile)
    queue.positions.index(at + 3).store(empty + position.first_token)
    queue.positions.index(at + 4).store(empty + position.num_queries)
    queue.positions.index(at + 5).store(empty + position.num_keys)
    barrier()
    mbarrier.arrive(queue.full.index(told % POSITIONS), count=1)


@gluon.jit
def hand_out_packed(call, C: gl.constexpr):
    """The scheduler warp, as `schedule.hand_out`. What is told of tile i is written over what was told of tile i - 3.

    All have read that by then: the producer asks for tile i when the queries of tile i - 1 are under way, so all
    consumers have released the buffer that these go to, which held the queries of tile i - 3. Before they did, they
    read even what was told of tile i - 2. (With two positions the first would be written over too early: the queries of
    tile 1 wait for nobody.)
    """
    queue = call.queue
    position, tiles = _position_of(gl.program_id(0), call.visibility, C)
    _tell(queue, 0, position)
    told = 1
    while position.tile >= 0:
        mbarrier.wait(queue.asked, (told - 1) & 1)
        number = draw(queue.counter, tiles, gl.num_programs(0))
        position, _ = _position_of(number, call.visibility, C)
        _tell(queue, told, position)
        told += 1


@gluon.jit
def told_position(queue, told, WARPS: gl.constexpr):
    """The PackedPosition of the program's tile number `told`, from 0 on: waits for `hand_out_packed`."""
    mbarrier.wait(queue.full.index(told % POSITIONS), told // POSITIONS & 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    at = told % POSITIONS * POSITION_WORDS
    return PackedPosition(
        sequence=gl.max(queue.positions.index(at).load(layout), axis=0),
        unit=gl.max(queue.positions.index(at + 1).load(layout), axis=0),
        tile=gl.max(queue.positions.index(at + 2).load(layout), axis=0),
        first_token=gl.max(queue.positions.index(at + 3).load(layout), axis=0),
        num_queries=gl.max(queue.positions.index(at + 4).load(layout), axis=0),
        num_keys=gl.max(queue.positions.index(at + 5).load(layout), axis=0),
    )  # fmt: skip


@gluon.jit
def window(packed):
    """(left, right): how many keys before and behind its own a query sees, at most `FAR`."""
    left = gl.where(packed.window_left < 0, FAR, gl.minimum(packed.window_left, FAR))
    right = gl.where(packed.window_right < 0, FAR, gl.minimum(packed.window_right, FAR))
    return left, right


@gluon.jit
def packed_blocks(position, packed, C: gl.constexpr):
    """(first key of the tile's first block, how many blocks it visits): at least one, of zeros if it sees nothing.

    Blocks lie on a grid from the sequence's first key on, as they do without pages.
    """
    TOKENS: gl.constexpr = 64 * C.consumers // C.pack
    BN: gl.constexpr = C.block_n
    left, right = window(packed)
    start = position.num_keys - position.num_queries
    m0 = gl.maximum(position.tile, 0) * TOKENS
    last = gl.minimum(m0 + TOKENS, position.num_queries) - 1
    lo = gl.maximum(start + m0 - left, 0)
    hi = gl.minimum(start + last + right + 1, position.num_keys)
    begin = lo // BN * BN
    count = gl.where(lo < hi, (hi - begin + BN - 1) // BN, 0)
    return gl.where(count > 0, begin, position.num_keys), gl.maximum(count, 1)


@gluon.jit
def packed_tile_of(position, call, CONSUMER: gl.constexpr, C: gl.constexpr):
    """The PackedTile at this PackedPosition, as partition CONSUMER of its program sees it. Any where there is none."""
    TOKENS: gl.constexpr = 64 * C.consumers // C.pack
    BN: gl.constexpr = C.block_n
    ROWS: gl.constexpr = C.rows
    PACK: gl.constexpr = C.pack
    ROWS_LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [C.warps, 1], [16, BN, 16]))
    packed = call.visibility
    left, right = window(packed)
    num_queries = position.num_queries
    num_keys = position.num_keys
    start = num_keys - num_queries
    m0 = gl.maximum(position.tile, 0) * TOKENS
    r0 = num_queries * 0 + CONSUMER * ROWS
    begin, blocks = packed_blocks(position, packed, C)
    query = m0 + (r0 + gl.arange(0, ROWS, ROWS_LAYOUT)) // PACK
    row_lo = gl.maximum(start + query - left, 0)
    row_hi = gl.minimum(start + query + right + 1, num_keys)
    # Keys before hi are seen by some of this partition's rows, keys [full_lo, full_hi) by all of them.
    own = m0 + CONSUMER * (ROWS // PACK)
    last = gl.minimum(own + ROWS // PACK, num_queries) - 1
    hi = gl.where(own < num_queries, gl.minimum(start + last + right + 1, num_keys), 0)
    full_lo = gl.maximum(start + last - left, 0)
    full_hi = gl.minimum(start + own + right + 1, num_keys)
    own_blocks = gl.minimum(gl.maximum((hi - begin + BN - 1) // BN, 1), blocks)
    left_edge = gl.minimum(gl.maximum((full_lo - begin + BN - 1) // BN, 0), own_blocks)
    right_edge = gl.maximum(gl.minimum(gl.maximum(full_hi - begin, 0) // BN, own_blocks), left_edge)
    return PackedTile(
        unit=position.unit, first_token=position.first_token, num_queries=num_queries, m0=m0, r0=r0, begin=begin,
        blocks=blocks, own_blocks=own_blocks, left_edge=left_edge, right_edge=right_edge, row_lo=row_lo, row_hi=row_hi,
    )  # fmt: skip

"""Which tile a program computes next: the first one that nobody has taken.

A tile is BLOCK_M queries of one head. Tiles are numbered, and each program goes up in the numbers.

The order: heads come in sections of a few, whose keys and values the L2 holds. Within a section tiles are ordered by
their number within the head, and under causal attention that is by length. Long tiles come first in the last section,
so that programs end with short ones. Before it directions alternate, so that neighbours differ little in length.

Who takes what: program p begins with tile p. Each next number comes from a counter of the launch. Fixed shares would
not do: what a tile costs depends on more than its length, SMs are not equally fast, and programs ended up to 10 %
apart. There are as many draws as tiles, and the last draw sets the counter back to zero. Which program computes a tile
does not move a bit of its output.
"""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .records import TilePosition
from .triton_api import barrier

# Keys and values of the heads that are in work at a time: what the L2 (50 MB, of which either half may hold a copy of
# what is in the other) holds beside queries and outputs. Twice as much is 2 to 4 % slower up to 4,096 keys.
SECTION_BYTES = 16 << 20


def heads_in_section(
    num_keys: int, bytes_per_key: int, num_heads: int, group: int, tiles_per_head: int, processors: int, rounds: int
) -> int:
    """How many query heads are worked on side by side, where tiles differ in length.

    As many as fit into SECTION_BYTES, or more where `rounds` ask for that. Then up to a third more or less, so that
    sections are of one size: a last one of few heads would not keep all programs busy.

    Args:
        num_keys, bytes_per_key: of one KV head, keys and values together.
        num_heads: of all sequences.
        group: query heads that share a KV head, which no section takes apart.
        rounds: tiles of a program that a section has at least.
    """
    fit = max(SECTION_BYTES // (num_keys * bytes_per_key), 1)
    wanted = max(fit, math.ceil(rounds * processors / (tiles_per_head * group)))
    groups = num_heads // group
    fewest = math.ceil(0.75 * groups / wanted)
    most = max(math.floor(groups / (0.75 * wanted)), fewest)
    sizes = {math.ceil(groups / sections) for sections in range(fewest, most + 1)}
    return group * min(sizes, key=lambda size: (-groups % size / size, abs(size - wanted), -size))


@gluon.jit
def tile_at(number, tiles_per_head, num_heads, section):
    """(head of all sequences, tile within the head) of the tile of this number."""
    section_number = number // (tiles_per_head * section)
    first_head = section_number * section
    heads = gl.minimum(section, num_heads - first_head)
    within = number - first_head * tiles_per_head
    row = within // heads
    # The last queries of a head see most keys, under causal attention.
    falling = ((num_heads - 1) // section - section_number) % 2 == 0
    return first_head + within % heads, gl.where(falling, tiles_per_head - 1 - row, row)


@gluon.jit
def position_of(number, num_heads, order):
    """The TilePosition of the tile of this number.

    Args:
        num_heads: of a sequence.
        order: a TileOrder.
    """
    num_tiles = order.all_heads * order.tiles_per_head
    number_there = gl.minimum(number, num_tiles - 1)
    head, tile = tile_at(number_there, order.tiles_per_head, order.all_heads, order.section)
    return TilePosition(b=head // num_heads, h=head % num_heads, tile=gl.where(number < num_tiles, tile, -1))


@gluon.jit
def draw(Counter, num_tiles, num_programs):
    """The number of the next tile that nobody has taken; from `num_tiles` on there is none.

    A program draws once beside each of its tiles, so that there are `num_tiles` draws. Where no program has more than
    one tile nobody draws.
    """
    number = num_tiles
    if num_tiles > num_programs:
        ticket = gl.atomic_add(Counter, 1, sem="relaxed", scope="gpu")
        if ticket == num_tiles - 1:
            gl.store(Counter, 0)
        number = num_programs + ticket
    return number


@gluon.jit
def hand_out(call, C: gl.constexpr):
    """The scheduler warp: when the producer asks for the next tile, tells it and the consumers its position.

    It is a warp of its own because the counter answers after a microsecond, and a position takes five divisions. The
    producer has no such time: of large heads it is but two blocks ahead.

    What is told beside the program's tile i is written over what was told beside tile i - 2. All consumers have read
    that by then. The producer asks when the queries of tile i are under way, so all consumers have released the buffer
    that these go to: it held the queries of tile i - 2 (with one query buffer, of tile i - 1). And their threads read
    what is told beside tile i - 2 before they release either. A thread that did not would miss two phases of
    `queue.full`, and wait forever.

    compute-sanitizer's racecheck reports these reads and writes. It does not follow the arrivals at `q_empty`, by which
    a consumer's threads say that they are done.
    """
    empty = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    queue = call.queue
    order = call.order
    tiles_done = 0
    position = position_of(gl.program_id(0), call.heads.num_heads, order)
    while position.tile >= 0:
        mbarrier.wait(queue.asked, tiles_done & 1)
        number = draw(queue.counter, order.all_heads * order.tiles_per_head, gl.num_programs(0))
        position = position_of(number, call.heads.num_heads, order)
        entry = tiles_done % 2
        queue.positions.index(entry * 3).store(empty + position.b)
        queue.positions.index(entry * 3 + 1).store(empty + position.h)
        queue.positions.index(entry * 3 + 2).store(empty + position.tile)
        barrier()
        mbarrier.arrive(queue.full.index(entry), count=1)
        tiles_done += 1


@gluon.jit
def next_position(queue, tiles_done, WARPS: gl.constexpr):
    """The TilePosition that `hand_out` tells a program which is at its tile number `tiles_done`: that of the next."""
    entry = tiles_done % 2
    mbarrier.wait(queue.full.index(entry), tiles_done // 2 & 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    b = gl.max(queue.positions.index(entry * 3).load(layout), axis=0)
    h = gl.max(queue.positions.index(entry * 3 + 1).load(layout), axis=0)
    tile = gl.max(queue.positions.index(entry * 3 + 2).load(layout), axis=0)
    return TilePosition(b=b, h=h, tile=tile)

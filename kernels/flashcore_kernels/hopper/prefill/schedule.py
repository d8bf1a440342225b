"""Which tile a program computes next: the first one that nobody has taken.

Tiles (BLOCK_M queries of one head) are numbered so that neighbours share keys and values, and so that their lengths
change slowly under causal attention: sections of a few heads, within a section by length, in one section falling, in
the next rising, in the last falling. Program p begins with tile p, and takes each next number from a counter of the
launch: what a tile costs depends on more than its length, and SMs are not equally fast, so that with fixed shares
programs end up to 10 % apart. Who draws the last number of all, one for each tile, sets the counter back to zero. Which
program computes a tile does not move a bit of it.
"""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..triton_api import barrier

# Keys and values of the heads that are in work at a time: what the L2 (50 MB, of which either half may hold a copy of
# what is in the other) holds beside queries and outputs. Twice as much is 2 to 4 % slower up to 4,096 keys.
SECTION_BYTES = 16 << 20


def heads_in_section(
    num_keys: int, bytes_per_key: int, num_heads: int, group: int, tiles_per_head: int, processors: int, rounds: int
) -> int:
    """How many query heads are worked on side by side, where tiles differ in length.

    As many as fit, or else as `rounds` ask for; a third more or less, where sections then are of one size: a last one
    of few heads would not keep all programs busy.

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
    which = number // (tiles_per_head * section)
    first_head = which * section
    heads = gl.minimum(section, num_heads - first_head)
    within = number - first_head * tiles_per_head
    row = within // heads
    # The last queries of a head see most keys, under causal attention.
    falling = ((num_heads - 1) // section - which) % 2 == 0
    return first_head + within % heads, gl.where(falling, tiles_per_head - 1 - row, row)


@gluon.jit
def place_of(number, heads, scales):
    """(sequence, head, tile within the head) of the tile of this number; the tile is -1 where there is none.

    Args:
        heads: of a sequence.
    """
    score_scale, cap_scale, all_heads, tiles_per_head, section = scales
    num_tiles = all_heads * tiles_per_head
    bh, tile = tile_at(gl.minimum(number, num_tiles - 1), tiles_per_head, all_heads, section)
    return bh // heads, bh % heads, gl.where(number < num_tiles, tile, -1)


@gluon.jit
def draw(Counter, num_tiles, num_programs):
    """The number of the next tile that nobody has taken; from `num_tiles` on there is none.

    Each program draws beside each of its tiles: `num_tiles` draws in all. Where each has one tile nobody draws.
    """
    number = num_tiles
    if num_tiles > num_programs:
        ticket = gl.atomic_add(Counter, 1, sem="relaxed", scope="gpu")
        if ticket == num_tiles - 1:
            gl.store(Counter, 0)
        number = num_programs + ticket
    return number


@gluon.jit
def hand_out(descs, smem, bars, queue, pointers, numbers, scales, C: gl.constexpr):
    """The scheduler warp: when the producer asks for the next tile, tells it and the consumers its place.

    A warp of its own, because the answer of the counter takes a microsecond and its place five divisions, and large
    heads are fetched but two blocks ahead.

    The producer asks beside tile `turn` when its queries are loaded: then all consumers have released the queries of
    the tile two before (with one slot, of the tile before), and read the place that this one overwrites: so each thread
    does that before it releases them. One that had not would miss two phases of `place_full`, and wait for ever.
    (compute-sanitizer's racecheck reports these reads and writes: it does not follow the arrivals at `q_empty`, by
    which a consumer's threads say that they are done.)
    """
    place_smem, place_full, place_asked, Counter = queue
    score_scale, cap_scale, all_heads, tiles_per_head, section = scales
    num_heads = numbers[0]
    empty = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    turn = 0
    b, h, tile = place_of(gl.program_id(0), num_heads, scales)
    while tile >= 0:
        mbarrier.wait(place_asked, turn & 1)
        b, h, tile = place_of(draw(Counter, all_heads * tiles_per_head, gl.num_programs(0)), num_heads, scales)
        slot = turn % 2
        place_smem.index(slot * 3).store(empty + b)
        place_smem.index(slot * 3 + 1).store(empty + h)
        place_smem.index(slot * 3 + 2).store(empty + tile)
        barrier()
        mbarrier.arrive(place_full.index(slot), count=1)
        turn += 1


@gluon.jit
def taken_over(queue, turn, WARPS: gl.constexpr):
    """What `hand_out` told beside tile `turn`."""
    place_smem, place_full, place_asked, Counter = queue
    slot = turn % 2
    mbarrier.wait(place_full.index(slot), turn // 2 & 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    b = gl.max(place_smem.index(slot * 3).load(layout), axis=0)
    h = gl.max(place_smem.index(slot * 3 + 1).load(layout), axis=0)
    tile = gl.max(place_smem.index(slot * 3 + 2).load(layout), axis=0)
    return b, h, tile

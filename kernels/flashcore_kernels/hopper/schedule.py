"""Which tile a program computes next: a fixed order, the same on every run.

Tiles (BLOCK_M queries of one head) are numbered so that neighbours share keys and values, and so that their lengths
change slowly under causal attention: sections of a few heads, within a section by length, in one section falling, in
the next rising, in the last falling. Program p of P takes tiles p, 2P - 1 - p, 2P + p, ...: back and forth, so that one
that gets the longest of a round gets the shortest of the next. For 132 programs that leaves the longest within 3 % of
the mean (test_hopper_schedule.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Keys and values of the heads that are in work at a time: what the L2 (50 MB) holds beside queries and outputs.
SECTION_BYTES = 24 << 20
# Rounds that a section lasts at least, or it would not balance.
SECTION_ROUNDS = 4


def heads_in_section(
    num_keys: int, bytes_per_key: int, num_heads: int, group: int, tiles_per_head: int, processors: int
) -> int:
    """How many query heads are worked on side by side, where tiles differ in length.

    Args:
        num_keys, bytes_per_key: of one KV head, keys and values together.
        num_heads: of all sequences.
        group: query heads that share a KV head.
    """
    fit = max(SECTION_BYTES // (num_keys * bytes_per_key), 1) * group
    heads = min(max(fit, -(-SECTION_ROUNDS * processors // tiles_per_head)), num_heads)
    # Sections of one size, and none that begins within a group.
    heads = -(-num_heads // -(-num_heads // heads))
    return -(-heads // group) * group


@gluon.jit
def tiles_of_program(program, num_programs, num_tiles):
    """How many tiles this program has."""
    rounds = num_tiles // num_programs
    left = num_tiles - rounds * num_programs
    place = gl.where(rounds % 2 == 1, num_programs - 1 - program, program)
    return gl.where(place < left, rounds + 1, rounds)


@gluon.jit
def tile_at(turn, program, num_programs, tiles_per_head, num_heads, section):
    """(head of all sequences, tile within the head) of this program's tile number `turn`."""
    place = gl.where(turn % 2 == 1, num_programs - 1 - program, program)
    tile = turn * num_programs + place
    which = tile // (tiles_per_head * section)
    first_head = which * section
    heads = gl.minimum(section, num_heads - first_head)
    within = tile - first_head * tiles_per_head
    row = within // heads
    # The last queries of a head see most keys, under causal attention.
    falling = ((num_heads - 1) // section - which) % 2 == 0
    return first_head + within % heads, gl.where(falling, tiles_per_head - 1 - row, row)

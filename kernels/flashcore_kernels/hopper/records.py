"""What warps of persistent programs hand to each other under names: which tile is next, and which blocks it has.

Records are made by keyword. Triton's cache of compiled kernels knows the functions that make and read them but not this
file, so the order of the fields must not matter to it.
"""

from typing import NamedTuple

from triton.experimental.gluon import language as gl


class Queue(NamedTuple):
    """How the scheduler warp tells the others which tile is next.

    Attributes:
        positions: shared memory, int32 `[6, 1]`: the fields of two TilePositions, of which one is being read while the
            other is written.
        full: two barriers: a position has been written.
        asked: a barrier: the producer wants the next position.
        counter: int32 in global memory: how many tiles the programs of this launch have drawn.
    """

    positions: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    asked: gl.shared_memory_descriptor
    counter: gl.tensor


class Heads(NamedTuple):
    """Heads of a sequence.

    Attributes:
        num_heads: how many heads have tiles: query heads, or KV heads where tiles are of keys.
        group: query heads that share a KV head.
    """

    num_heads: gl.tensor
    group: gl.tensor


class ScoreFactors(NamedTuple):
    """fp32 factors that leave the scores in units of log2, see `Problem.score_factors`.

    Attributes:
        score_scale: what Q K^T is multiplied by: with softcap before the tanh, otherwise for good.
        cap_scale: with softcap, what the tanh is multiplied by.
    """

    score_scale: gl.tensor
    cap_scale: gl.tensor


class TileOrder(NamedTuple):
    """How tiles are numbered, see schedule.py. All are int32.

    Attributes:
        all_heads: heads of all sequences.
        tiles_per_head: tiles of a head.
        section: heads of a section.
    """

    all_heads: gl.tensor
    tiles_per_head: gl.tensor
    section: gl.tensor


class TilePosition(NamedTuple):
    """Which tile: sequence b, its head h, the tile within the head. `tile` is -1 where there is none."""

    b: gl.tensor
    h: gl.tensor
    tile: gl.tensor


class Tile(NamedTuple):
    """A tile of queries as one partition of consumers sees it: which rows are its own, which blocks they see.

    Blocks are counted from the tile's first one. A block at an edge is one in which rows differ in what they see: its
    scores are masked row by row.

    Attributes:
        b, h: sequence, and head of the sequence.
        head_of_all: head of all sequences.
        r0: first of the partition's rows.
        begin: first key of the tile's first block.
        blocks: how many the producer fetches: what any consumer needs.
        own_blocks: how many this partition computes, from the first on.
        left_edge: this many of its first blocks are at the left edge.
        right_edge: its blocks from this one on are at the right edge.
        row_lo, row_hi: `[rows]`: row i sees keys [row_lo[i], row_hi[i]).
        holes: see SequenceBounds.
    """

    b: gl.tensor
    h: gl.tensor
    head_of_all: gl.tensor
    r0: gl.tensor
    begin: gl.tensor
    blocks: gl.tensor
    own_blocks: gl.tensor
    left_edge: gl.tensor
    right_edge: gl.tensor
    row_lo: gl.tensor
    row_hi: gl.tensor
    holes: gl.tensor

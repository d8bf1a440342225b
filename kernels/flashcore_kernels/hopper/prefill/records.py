"""What the prefill's warps hand to each other under names: the arguments of the call, shared memory, a tile.

Records are made by keyword. Triton's cache of compiled kernels knows the functions that make and read them but not this
file, so the order of the fields must not matter to it.
"""

from typing import NamedTuple

from triton.experimental.gluon import language as gl

from ..visible import Visibility


class Descriptors(NamedTuple):
    """How the copy engine finds the tensors. Those of what does not exist are copies of others, and never looked at.

    Attributes:
        q0, q1: of Q `[B, H, Q, D]`, in tiles `[1, 1, rows, d0]` and `[1, 1, rows, d1]`.
        k0, k1: of K `[B, Hkv, K, D]`, in tiles `[1, 1, BN, d0]` and `[1, 1, BN, d1]`.
        v0, v1: of V `[B, Hkv, K, Dv]`, in tiles `[1, 1, BN, dv0]` and `[1, 1, BN, dv1]`.
        o0, o1: of the output `[B, H, Q, Dv]`, in tiles of 64 rows; with one query buffer o0's have dv0 / 2 columns.
    """

    q0: gl.tensor
    q1: gl.tensor
    k0: gl.tensor
    k1: gl.tensor
    v0: gl.tensor
    v1: gl.tensor
    o0: gl.tensor
    o1: gl.tensor


class Buffers(NamedTuple):
    """Shared memory. Tiles have two leading dimensions of 1, as the copy engine wants them.

    Attributes:
        q0, q1: queries, `[partitions * query_buffers, 1, 1, rows, d0]` and `d1`.
        k0, k1: keys, `[stages, 1, 1, BN, d0]` and `d1`.
        v0, v1: values, `[stages, 1, 1, BN, dv0]` and `dv1`.
        keep: int32 `[BN]`: which keys of a block exist and are seen, for the producer alone.
        o0: the output on its way out: `[consumers, 1, 1, 64, dv0 / 2]` with one query buffer, else q0 itself.
    """

    q0: gl.shared_memory_descriptor
    q1: gl.shared_memory_descriptor
    k0: gl.shared_memory_descriptor
    k1: gl.shared_memory_descriptor
    v0: gl.shared_memory_descriptor
    v1: gl.shared_memory_descriptor
    keep: gl.shared_memory_descriptor
    o0: gl.shared_memory_descriptor


class Barriers(NamedTuple):
    """Arrays of barriers in shared memory. `full`: data has arrived; `empty`: the consumers are done with it.

    Attributes:
        q_full, q_empty: one for each query buffer of each partition.
        k_full, k_empty, v_full, v_empty: one for each stage.
        v_raw: one alone: values have arrived that the producer has to scrub before it calls them full.
    """

    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor
    v_raw: gl.shared_memory_descriptor


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


class Pointers(NamedTuple):
    """Global memory. Where the call has no such tensor there is an integer, which is never looked at.

    Attributes:
        lse: fp32 `[B, H, Q]`.
        key_range: int32, see key_range.py.
        sinks: logits `[H]`.
    """

    lse: gl.tensor
    key_range: gl.tensor
    sinks: gl.tensor


class Heads(NamedTuple):
    """Query heads: of a sequence, and of those how many share a KV head."""

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
        all_heads: query heads of all sequences.
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


class OutputRows(NamedTuple):
    """Where consumers write their output without the copy engine: its address, strides and value_dim.

    Attributes:
        out: `[B, H, Q, Dv]`.
        stride_b, stride_h, stride_s: in units of 8 elements.
        value_eights: value_dim / 8.
    """

    out: gl.tensor
    stride_b: gl.tensor
    stride_h: gl.tensor
    stride_s: gl.tensor
    value_eights: gl.tensor


class Call(NamedTuple):
    """All that the partitions of a program work with."""

    descriptors: Descriptors
    buffers: Buffers
    barriers: Barriers
    queue: Queue
    pointers: Pointers
    heads: Heads
    visibility: Visibility
    factors: ScoreFactors
    order: TileOrder


class Tile(NamedTuple):
    """A tile as one partition of consumers sees it: which rows are its own, and what they see of which blocks.

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


class Softmax(NamedTuple):
    """What a partition carries from block to block of a tile.

    Attributes:
        acc0, acc1: fp32 `[rows, dv0]` and `[rows, dv1]`: sums of P V. They lack the last block's.
        p: `[rows, BN]`: what `_left_of_scores` left of the last block's scores.
        m: fp32 `[rows]`: maxima in units of log2.
        l: fp32 `[rows, 4]`: sums of probabilities, see `row_sums`.
        alpha: `[rows]`: what the sums before the last block shrink by, for its maxima.
    """

    acc0: gl.tensor
    acc1: gl.tensor
    p: gl.tensor
    m: gl.tensor
    l: gl.tensor
    alpha: gl.tensor

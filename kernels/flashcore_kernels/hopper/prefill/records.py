"""What the prefill's warps hand to each other under names: the arguments of the call, shared memory, sums.

Records are made by keyword. Triton's cache of compiled kernels knows the functions that make and read them but not this
file, so the order of the fields must not matter to it.
"""

from typing import NamedTuple

from triton.experimental.gluon import language as gl

from ..dropout import Dropout
from ..records import Heads, Queue, ScoreFactors, TileOrder
from ..visible import Visibility


class Descriptors(NamedTuple):
    """How the copy engine finds the tensors. Those of what does not exist are copies of others, and never looked at.

    Attributes:
        q0, q1: of Q `[B, H, Q, D]`, in tiles `[1, 1, rows, d0]` and `[1, 1, rows, d1]`.
        k0, k1: of K `[B, Hkv, K, D]`, in tiles `[1, 1, BN, d0]` and `[1, 1, BN, d1]`.
        v0, v1: of V `[B, Hkv, K, Dv]`, in tiles `[1, 1, BN, dv0]` and `[1, 1, BN, dv1]`.
        o0, o1: of the output `[B, H, Q, Dv]`, in tiles of 64 rows; with one query buffer o0's have dv0 / 2 columns.
        mask: of a bias `[B, H, Q, K]`, or 1 where it is broadcast, in tiles `[1, 1, 64, BN]`.
    """

    q0: gl.tensor
    q1: gl.tensor
    k0: gl.tensor
    k1: gl.tensor
    v0: gl.tensor
    v1: gl.tensor
    o0: gl.tensor
    o1: gl.tensor
    mask: gl.tensor


class Buffers(NamedTuple):
    """Shared memory. Tiles have two leading dimensions of 1, as the copy engine wants them.

    Attributes:
        q0, q1: queries, `[partitions * query_buffers, 1, 1, rows, d0]` and `d1`.
        k0, k1: keys, `[stages, 1, 1, BN, d0]` and `d1`.
        v0, v1: values, `[stages, 1, 1, BN, dv0]` and `dv1`.
        keep: int32 `[BN]`: which keys of a block exist and are seen, for the producer alone.
        o0: the output on its way out: `[consumers, 1, 1, 64, dv0 / 2]` with one query buffer, else q0 itself.
        mask: a bias, `[consumers, 1, 1, 64, BN]`.
    """

    q0: gl.shared_memory_descriptor
    q1: gl.shared_memory_descriptor
    k0: gl.shared_memory_descriptor
    k1: gl.shared_memory_descriptor
    v0: gl.shared_memory_descriptor
    v1: gl.shared_memory_descriptor
    keep: gl.shared_memory_descriptor
    o0: gl.shared_memory_descriptor
    mask: gl.shared_memory_descriptor


class Barriers(NamedTuple):
    """Arrays of barriers in shared memory. `full`: data has arrived; `empty`: the consumers are done with it.

    Attributes:
        q_full, q_empty: one for each query buffer of each partition.
        k_full, k_empty, v_full, v_empty: one for each stage.
        v_raw: one alone: values have arrived that the producer has to scrub before it calls them full.
        mask_full, mask_empty: one for each consumer.
    """

    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor
    v_raw: gl.shared_memory_descriptor
    mask_full: gl.shared_memory_descriptor
    mask_empty: gl.shared_memory_descriptor


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


class DenseMask(NamedTuple):
    """A dense mask or bias, and its map (see mask_map.py). Without one, integers that are never looked at.

    Attributes:
        lines, bits: int32, of the map.
        bias: a bias that all queries share, `[B, H, 1, K]`.
        line_b, line_h, line_t: lines from one sequence to the next, from one head, from one tile; 0: they share one.
        row_b, row_h, row_q: rows of bits likewise.
        bias_b, bias_h, bias_k: elements of `bias` likewise. Of a bias in tiles, 1 or 0: whether sequences have their
            own, and whether heads have.
        num_blocks: blocks of keys.
    """

    lines: gl.tensor
    bits: gl.tensor
    bias: gl.tensor
    line_b: gl.tensor
    line_h: gl.tensor
    line_t: gl.tensor
    row_b: gl.tensor
    row_h: gl.tensor
    row_q: gl.tensor
    bias_b: gl.tensor
    bias_h: gl.tensor
    bias_k: gl.tensor
    num_blocks: gl.tensor


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
    mask: DenseMask
    dropout: Dropout


class ShortBuffers(NamedTuple):
    """Shared memory of a program of the short kernel.

    Attributes:
        k0: keys, `[stages, 1, 1, BN, d0]`.
        v0: values, `[stages, 1, 1, BN, dv0]`.
        keep: as in Buffers; with a KeyRange alone.
    """

    k0: gl.shared_memory_descriptor
    v0: gl.shared_memory_descriptor
    keep: gl.shared_memory_descriptor


class ShortCall(NamedTuple):
    """All that a program of the short kernel works with, of what stands in a Call."""

    buffers: ShortBuffers
    pointers: Pointers
    heads: Heads
    visibility: Visibility
    dropout: Dropout


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

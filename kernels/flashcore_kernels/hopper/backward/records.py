"""What the backward's warps hand to each other under names: the arguments of a call, shared memory, a tile of keys.

Records are made by keyword. Triton's cache of compiled kernels knows the functions that make and read them but not this
file, so the order of the fields must not matter to it.
"""

from typing import NamedTuple

from triton.experimental.gluon import language as gl

from ..records import Heads, Queue, ScoreFactors, TileOrder
from ..visible import SequenceBounds, Visibility


class Descriptors(NamedTuple):
    """How the copy engine finds the tensors.

    Attributes:
        q, g: of Q `[B, H, Q, D]` and dO `[B, H, Q, Dv]`, in tiles of 64 rows for dQ, of `C.block_m` for dK and dV.
        k, v: of K `[B, Hkv, K, D]` and V `[B, Hkv, K, Dv]`, in tiles of `C.block_n` rows for dQ, of 64 for dK and dV.
    """

    q: gl.tensor
    g: gl.tensor
    k: gl.tensor
    v: gl.tensor


class DqBuffers(NamedTuple):
    """Shared memory of `dq`. Tiles have two leading dimensions of 1, as the copy engine wants them.

    Attributes:
        q, g: of each consumer, `[2, 1, 1, 64, d]` and `dv`.
        k, v: `[stages, 1, 1, BN, d]` and `dv`.
        keep: int32 `[BN]`: which keys of a block exist and are seen, for the producer alone.
    """

    q: gl.shared_memory_descriptor
    g: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    keep: gl.shared_memory_descriptor


class DqBarriers(NamedTuple):
    """Arrays of barriers of `dq`. `full`: data has arrived; `empty`: the consumers are done with it.

    Attributes:
        q_full, q_empty: one for each consumer, of Q and dO.
        k_full, k_empty, v_full, v_empty: one for each stage.
        raw: one alone: keys or values have arrived that the producer has to scrub before it calls them full.
    """

    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor
    raw: gl.shared_memory_descriptor


class DkdvBuffers(NamedTuple):
    """Shared memory of `dkdv`. Tiles have two leading dimensions of 1, as the copy engine wants them.

    Attributes:
        q, g: `[query_stages, 1, 1, BM, d]` and `[grad_stages, 1, 1, BM, dv]`.
        k, v: of each consumer, `[2, 1, 1, 64, d]` and `dv`; `[1, ...]` where they share them.
        lse, delta: fp32 `[query_stages, BM]` and `[grad_stages, BM]`: of the queries in q and in g, see `preprocess`.
        ranges: int32 `[2 * query_stages, BM]`: first and end of the keys that each query in q sees; only with a key
            range a query.
        words: fp32 `[2 * query_stages, BM]`: the first word of the queries in each q, then their second, see
            `preprocess`; only with dropout.
        p: fp32 `[64, BM]`: P^T, which one consumer hands to the other where they share their keys.
        keep: int32 `[BM]`: which queries of a block see a key, for the producer alone.
    """

    q: gl.shared_memory_descriptor
    g: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor
    ranges: gl.shared_memory_descriptor
    words: gl.shared_memory_descriptor
    p: gl.shared_memory_descriptor
    keep: gl.shared_memory_descriptor


class DkdvBarriers(NamedTuple):
    """Arrays of barriers of `dkdv`. `full`: data has arrived; `empty`: the consumers are done with it.

    Attributes:
        q_full, q_empty: one for each stage, of Q and lse.
        g_full, g_empty: one for each stage, of dO and delta.
        kv_full, kv_empty: one for each consumer: of its K and V, or, where they share keys, of K and of V.
        raw: one alone: queries or dO have arrived that the producer has to scrub before it calls them full.
        p_full, p_empty: one alone each, of p.
    """

    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    g_full: gl.shared_memory_descriptor
    g_empty: gl.shared_memory_descriptor
    kv_full: gl.shared_memory_descriptor
    kv_empty: gl.shared_memory_descriptor
    raw: gl.shared_memory_descriptor
    p_full: gl.shared_memory_descriptor
    p_empty: gl.shared_memory_descriptor


class GradientStrides(NamedTuple):
    """Of a gradient `[B, heads, rows, columns]`, all in units of 8 elements; `eights` is how many columns there are."""

    stride_b: gl.tensor
    stride_h: gl.tensor
    stride_s: gl.tensor
    eights: gl.tensor


class DqPointers(NamedTuple):
    """Global memory that `dq` reads and writes without the copy engine.

    Attributes:
        rows: fp32 `[2 or 4, B * H, places]`: lse, delta, and with dropout two words, see `preprocess`.
        key_range: int32, see key_range.py; where there is none an integer, which is never looked at.
        spans: int32 `[B, spans, 8]`, see spans.py; without a key range a query an integer, which is never looked at.
        grad_query: `[B, H, Q, D]`.
        places: of a head in `rows`.
        of_delta: elements from the lse of a query to its delta, and from that to its words.
        query_strides: of grad_query.
    """

    rows: gl.tensor
    key_range: gl.tensor
    spans: gl.tensor
    grad_query: gl.tensor
    places: gl.tensor
    of_delta: gl.tensor
    query_strides: GradientStrides


class DkdvPointers(NamedTuple):
    """Global memory that `dkdv` reads and writes without the copy engine.

    Attributes:
        rows, key_range, spans, places, of_delta: as in DqPointers.
        grad_key, grad_value: `[B, Hkv, K, D]` and `[B, Hkv, K, Dv]`.
        key_strides, value_strides: of these.
    """

    rows: gl.tensor
    key_range: gl.tensor
    spans: gl.tensor
    grad_key: gl.tensor
    grad_value: gl.tensor
    places: gl.tensor
    of_delta: gl.tensor
    key_strides: GradientStrides
    value_strides: GradientStrides


class Call(NamedTuple):
    """All that the partitions of a program work with.

    Attributes:
        grad_scale, value_scale: what the sums of dQ, or those of dK, are multiplied by in the end, and, with dropout,
            those of dV.
        drop_below: int32, see `drop_threshold`; looked at with dropout alone.
    """

    descriptors: Descriptors
    buffers: DqBuffers | DkdvBuffers
    barriers: DqBarriers | DkdvBarriers
    queue: Queue
    pointers: DqPointers | DkdvPointers
    grad_scale: gl.tensor
    value_scale: gl.tensor
    drop_below: gl.tensor
    heads: Heads
    visibility: Visibility
    factors: ScoreFactors
    order: TileOrder


class CleanRows(NamedTuple):
    """Which rows are no NaN: those of [lo, hi), but where `any` holds only those that the buffer `keep` says."""

    lo: gl.tensor
    hi: gl.tensor
    any: gl.tensor


class KeyTile(NamedTuple):
    """A tile of `dkdv`: keys of one KV head, and the queries that see them.

    Attributes:
        b, kv_head: sequence, and KV head of the sequence.
        n0: its first key. It may be negative: then the first keys of it do not exist.
        begin, end: the blocks of queries [begin, end) of each head see some of its keys.
        bounds: SequenceBounds of the sequence.
    """

    b: gl.tensor
    kv_head: gl.tensor
    n0: gl.tensor
    begin: gl.tensor
    end: gl.tensor
    bounds: SequenceBounds

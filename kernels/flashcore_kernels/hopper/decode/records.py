"""What the decode's functions hand to each other under names: shared memory, keys, and where the answer goes.

Records are made by keyword. Triton's cache of compiled kernels knows the functions that make and read them but not this
file, so the order of the fields must not matter to it.
"""

from typing import NamedTuple

from triton.experimental.gluon import language as gl


class Buffers(NamedTuple):
    """Shared memory.

    Attributes:
        k, v: keys `[stages, BN, D]` and values `[stages, BN, DV]`, as they are stored.
        q, p: queries `[R, D]` and probabilities `[R, BN]` in 16 bits.
    """

    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    q: gl.shared_memory_descriptor
    p: gl.shared_memory_descriptor


class KeysAndValues(NamedTuple):
    """One KV head of one sequence in global memory.

    Attributes:
        k, v: addresses of key slot 0 and of its values.
        stride_ks, stride_vs: from a key to the next, in units of 16 bytes.
    """

    k: gl.tensor
    v: gl.tensor
    stride_ks: gl.tensor
    stride_vs: gl.tensor


class PagedKeysAndValues(NamedTuple):
    """One KV head of one sequence whose keys lie in pages. Strides are in units of 16 bytes.

    Attributes:
        k, v: addresses of the first key of page 0, and of its values.
        stride_ks, stride_vs: from a key to the next within a page.
        stride_kp, stride_vp: from a page to the next.
        table: the sequence's line of the block table, int32.
        width, num_pages: entries of the line, pages of the pool.
        past: keys from this one on are not in pages, with `C.new_keys`.
        new_k, new_v: addresses of key `past` and its values.
    """

    k: gl.tensor
    v: gl.tensor
    stride_ks: gl.tensor
    stride_vs: gl.tensor
    stride_kp: gl.tensor
    stride_vp: gl.tensor
    table: gl.tensor
    width: gl.tensor
    num_pages: gl.tensor
    past: gl.tensor
    new_k: gl.tensor
    new_v: gl.tensor


class Queries(NamedTuple):
    """The queries, and what scores and sums are multiplied with.

    Attributes:
        q: Q.
        b: which index of its first dimension.
        stride_b, stride_h, stride_s: in units of 16 bytes.
        key_scale, value_scale: addresses of the scales of this KV head, beside e4m3 alone.
    """

    q: gl.tensor
    b: gl.tensor
    stride_b: gl.tensor
    stride_h: gl.tensor
    stride_s: gl.tensor
    key_scale: gl.tensor
    value_scale: gl.tensor


class Partials(NamedTuple):
    """Mailboxes, and how many programs share a tile's chunks.

    Attributes:
        words: of all mailboxes, see the kernel.
        num_splits: most programs of a tile.
        chunks_each: chunks that each takes.
        row_nodes: mailboxes of a row.
    """

    words: gl.tensor
    num_splits: gl.tensor
    chunks_each: gl.tensor
    row_nodes: gl.tensor


class Bitmap(NamedTuple):
    """Which keys of a sequence exist, where its KeyRange says more than the first and the last.

    Attributes:
        words: address of int32 words, a bit for each key; never looked at without a KeyRange.
        holes: not 0: the bits count.
    """

    words: gl.tensor
    holes: gl.tensor


class Block(NamedTuple):
    """Up to BN keys of one chunk.

    Attributes:
        n: its first key.
        end: where its chunk ends.
    """

    n: gl.tensor
    end: gl.tensor


class RowLimits(NamedTuple):
    """Which keys the rows of a tile see.

    Attributes:
        row_lo, row_hi: `[R]`: row i sees keys [row_lo[i], row_hi[i]).
        all_lo, all_hi: all rows see keys [all_lo, all_hi).
    """

    row_lo: gl.tensor
    row_hi: gl.tensor
    all_lo: gl.tensor
    all_hi: gl.tensor


class Sums(NamedTuple):
    """Of some chunks' keys, fp32: acc `[DV, R]` of V^T P^T, maxima m `[R]` in units of log2, l `[R]` of P."""

    acc: gl.tensor
    m: gl.tensor
    l: gl.tensor


class Answer(NamedTuple):
    """Where the rows of one KV head of one sequence go. What the call has not is an integer, and never looked at.

    Attributes:
        out: Out `[B, H, Q, Dv]`, the heads inside the sequence in memory.
        lse: fp32 `[B, H, Q]`; of packed queries `[H, T]`.
        lse_stride: Q; of packed queries T.
        sinks: logits `[H]`.
        b, kv_head: sequence, and KV head of the sequence.
        num_queries: of a sequence.
    """

    out: gl.tensor
    lse: gl.tensor
    lse_stride: gl.tensor
    sinks: gl.tensor
    b: gl.tensor
    kv_head: gl.tensor
    num_queries: gl.tensor

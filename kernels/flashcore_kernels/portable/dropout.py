"""Which attention weights dropout keeps: a function of where a weight stands, the same in every kernel."""

import triton
import triton.language as tl

# The least that passes BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"); FlashAttention has as
# many. More would cost every tile with dropout.
ROUNDS = tl.constexpr(7)


@triton.jit
def dropout_keep(Philox, head, rows, first_quad, drop_below, BLOCK_N: tl.constexpr):
    """bool [M, BLOCK_N]: which weights of queries `rows` [M] stay, for keys from 4 * `first_quad` on.

    Philox-4x32 makes four numbers at once, of four neighbouring keys. Its key is the seed, its counter (quad, query,
    head, offset): no two weights of a call share a number, and no kernel's tiles matter.

    Args:
        Philox: int64 `[2]` in device memory: seed, and offset (its halves are folded into 32 bits).
        head: b * H + h: heads that share a KV head drop different weights.
        rows: int32 [M], numbers of the queries.
        first_quad: (n - first) // 4 for the block's first key n, where `first` is the sequence's first key: blocks lie
            on a grid that begins there, so n - first is a multiple of 4.
        drop_below: dropout * 2**32 - 2**31 as int32: numbers below it drop their weight.
    """
    quads = first_quad + tl.arange(0, BLOCK_N // 4)  # [N / 4]
    offset = tl.load(Philox + 1)
    offset = (offset ^ (offset >> 32)).to(tl.int32)
    zeros = tl.zeros([rows.shape[0], BLOCK_N // 4], tl.int32)
    r0, r1, r2, r3 = tl.philox(
        tl.load(Philox), zeros + quads[None, :], zeros + rows[:, None], zeros + head, zeros + offset, ROUNDS
    )
    even = tl.interleave(_stays(r0, drop_below), _stays(r2, drop_below))  # of keys 0 and 2 in each quad
    odd = tl.interleave(_stays(r1, drop_below), _stays(r3, drop_below))
    return tl.interleave(even, odd) != 0


@triton.jit
def dropout_keep_at(Philox, head, rows, keys, drop_below):
    """bool [M, N]: the same for any keys: `keys` [N] are n - first. Four times the work of `dropout_keep`."""
    offset = tl.load(Philox + 1)
    offset = (offset ^ (offset >> 32)).to(tl.int32)
    zeros = tl.zeros([rows.shape[0], keys.shape[0]], tl.int32)
    # Before the first key nobody looks; a counter must not be negative all the same.
    r0, r1, r2, r3 = tl.philox(
        tl.load(Philox), zeros + (tl.maximum(keys, 0) // 4)[None, :], zeros + rows[:, None], zeros + head,
        zeros + offset, ROUNDS,
    )  # fmt: skip
    place = zeros + (tl.maximum(keys, 0) % 4)[None, :]
    r = tl.where(place < 2, tl.where(place == 0, r0, r1), tl.where(place == 2, r2, r3))
    return r.to(tl.int32, bitcast=True) >= drop_below


@triton.jit
def _stays(r, drop_below):
    # As bytes: Triton moves those between layouts, not bits.
    return (r.to(tl.int32, bitcast=True) >= drop_below).to(tl.int8)


def drop_threshold(dropout: float) -> int:
    """`drop_below` for a probability of dropping.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: got {dropout}; the probability of dropping a weight is at least 0 and below 1")
    return min(round(dropout * 2**32), 2**32 - 1) - 2**31

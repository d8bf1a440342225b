"""Which attention weights dropout keeps: a function of where a weight stands, the same in every kernel."""

import triton
import triton.language as tl

# The least that passes BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"); FlashAttention has as
# many. It is done once a row, so more would cost nothing, and gain nothing.
ROUNDS = tl.constexpr(7)


@triton.jit
def dropout_keys(Philox, head, rows):
    """Two int32 [M], which say what is dropped in each of the queries `rows` [M] (see `dropout_keep`).

    Numbers of Philox-4x32: its key is the seed, its counter (query, head, offset's low half, its high half).

    Args:
        Philox: int64 `[2]` in device memory: seed and offset.
        head: b * H + h: heads that share a KV head drop different weights.
        rows: int32, numbers of the queries.
    """
    offset = tl.load(Philox + 1)
    zeros = tl.zeros(rows.shape, tl.int32)
    r0, r1, _, _ = tl.philox(
        tl.load(Philox), zeros + rows, zeros + head, zeros + offset.to(tl.int32), zeros + (offset >> 32).to(tl.int32),
        ROUNDS,
    )  # fmt: skip
    return r0.to(tl.int32, bitcast=True), r1.to(tl.int32, bitcast=True)


@triton.jit
def dropout_keep(row_0, row_1, keys, drop_below):
    """bool: which weights stay, for the broadcast shape of `dropout_keys` and keys.

    A hash of the key's number under the row's two: Philox for each weight takes four times the instructions, and makes
    four neighbours at once, which no tensor core's layout has in one thread. The steps are those of Wellons' lowbias32
    (nullprogram.com/blog/2018/07/31), without its last, which only the lower half feels.

    Args:
        keys: int32, n - first of each key n, where `first` is its sequence's first key: padding changes nothing.
        drop_below: dropout * 2**32 - 2**31 as int32: hashes below it drop their weight.
    """
    x = (keys * -1640531535 ^ row_0).to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = ((x ^ (x >> 15)) + row_1.to(tl.uint32, bitcast=True)) * 0x846CA68B
    return x.to(tl.int32, bitcast=True) >= drop_below


def drop_threshold(dropout: float) -> int:
    """`drop_below` for a probability of dropping.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: got {dropout}; the probability of dropping a weight is at least 0 and below 1")
    return min(round(dropout * 2**32), 2**32 - 1) - 2**31

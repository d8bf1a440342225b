"""Which attention weights dropout keeps: a function of where a weight stands, the same in every kernel.

Plain arithmetic, so that kernels in Triton and in Gluon call the same functions.
"""

import triton
import triton.language as tl

# The least that passes BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3").
ROUNDS = tl.constexpr(7)

# Factors of Wellons' lowbias32 (nullprogram.com/blog/2018/07/31).
FIRST_FACTOR = tl.constexpr(0x7FEB352D)
SECOND_FACTOR = tl.constexpr(0x846CA68B)


@triton.jit
def dropout_keys(Philox, head, rows):
    """Two uint32 [M], for each of `rows`, which say what is dropped in it (see `dropout_hash`).

    Philox-4x32 gives each head two numbers: its key is the seed, its counter (head, 0, the offset's halves). Under
    these the query's number is hashed, in steps that all can be undone, so that no two queries of a head are alike.

    Args:
        Philox: int64 `[2]` in device memory: seed and offset.
        head: int32, b * H + h: heads that share a KV head drop different weights.
        rows: int32 [M], numbers of the queries.
    """
    offset = tl.load(Philox + 1)
    head_0, head_1, _, _ = tl.philox(
        tl.load(Philox), head, head * 0, offset.to(tl.int32), (offset >> 32).to(tl.int32), ROUNDS
    )
    x = (rows * -1640531535).to(tl.uint32, bitcast=True) ^ head_0
    x = (x ^ (x >> 16)) * FIRST_FACTOR
    x = ((x ^ (x >> 15)) + head_1) * SECOND_FACTOR
    x = x ^ (x >> 16)
    return x, (x * 0xC2B2AE35) ^ head_1


@triton.jit
def dropout_keep(row_0, row_1, keys, drop_below):
    """bool: which weights stay, for the broadcast shape of `dropout_keys` and keys: those with a large hash.

    Args:
        drop_below: dropout * 2**32 - 2**31 as int32: hashes below it drop their weight.
    """
    return dropout_hash(row_0, row_1, keys) >= drop_below


@triton.jit
def dropout_hash(row_0, row_1, keys):
    """int32, for the broadcast shape of `dropout_keys` and keys.

    Both products of lowbias32, of the key's number under the row's first and with its second added: five instructions
    a weight. Left out are its first step, for numbers that lie close together, which these do not, and its last, which
    only the lower half feels. Philox for each weight takes four times the instructions, and makes four neighbours at
    once, which no tensor core's layout has in one thread.

    Args:
        keys: int32, n - first of each key n, where `first` is its sequence's first key: padding changes nothing.
    """
    x = ((keys * -1640531535).to(tl.uint32, bitcast=True) ^ row_0) * FIRST_FACTOR
    x = (x ^ (x >> 15)) * SECOND_FACTOR + row_1
    return x.to(tl.int32, bitcast=True)


def drop_threshold(dropout: float) -> int:
    """`drop_below` for a probability of dropping.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: got {dropout}; the probability of dropping a weight is at least 0 and below 1")
    return min(round(dropout * 2**32), 2**32 - 1) - 2**31

"""The type of a table's rows."""

from typing import NamedTuple


class Row(NamedTuple):
    """One configuration of a portable kernel.

    Attributes:
        kernel: that it is for.
        bits: of an element of K and V.
        head_dim: the larger of K's and V's, at the most.
        block_m, block_n: rows of a tile, keys of a block.
        num_warps, num_stages: of the launch.
        why: what speaks for it: a measurement, or the limit that forces it.
        min_chunk: decode: least keys of a chunk.
        chunks: decode: into how many chunks one long sequence is cut, over all of its KV heads: enough to fill the GPU.
        gaps: it serves calls with a dense mask that differs from query to query, a decode's with any dense mask, and
            those with a key range for each query; and only those. Between the first and the
            last key that a tile sees there may be keys that none of its rows sees.
        full_columns: it serves only head dimensions that fill the columns of their tiles (see `choose.two_powers`).
            Others are loaded with a look at each column, which takes registers. Such rows stand before the others.
        ranges: False: it serves only calls without a key range. Such rows stand before those with True, and have their
            `block_n`: a sequence gets the same bits from both.
    """

    kernel: str
    bits: int
    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    why: str
    min_chunk: int = 64
    chunks: int = 128
    gaps: bool = False
    full_columns: bool = False
    ranges: bool = True

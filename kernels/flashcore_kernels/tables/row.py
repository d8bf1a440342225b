"""The type of a table's rows."""

from typing import NamedTuple


class Row(NamedTuple):
    """One configuration: for `kernel`, elements of `bits` bits and head dimensions up to `head_dim`.

    `gaps` rows serve calls with a dense mask or a key range for each query, and only those.

    `min_blocks`, `chunks` and `programs` are for decode: the least blocks of a chunk, how many chunks one long sequence
    is cut into over all of its KV heads, and how many programs fill the GPU.

    `why` says what speaks for it: a measurement, or the limit that forces it.
    """

    kernel: str
    bits: int
    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    why: str
    min_blocks: int = 1
    chunks: int = 128
    programs: int = 256
    gaps: bool = False

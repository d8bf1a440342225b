"""The type of a table's rows."""

from typing import NamedTuple


class Row(NamedTuple):
    """One configuration: for `kernel`, elements of `bits` bits and head dimensions up to `head_dim`.

    `gaps` rows serve calls with a dense mask or a key range for each query, and only those.

    `min_chunk` and `programs` are for decode: the least keys of a chunk, and how many programs one long sequence gets,
    over all of its KV heads.

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
    min_chunk: int = 64
    programs: int = 128
    gaps: bool = False

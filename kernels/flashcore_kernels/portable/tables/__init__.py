"""Shipped configurations: which tiles each kernel uses on which GPU. No tuning happens at run time.

One file an architecture, each row with the reason for it. `row_for` finds the row.
"""

from contextvars import ContextVar

import torch

from . import sm80, sm89, sm90, sm100
from .row import Row

# Compute capability -> table. A capability that is not listed takes the nearest listed one below it.
TABLES = {80: sm80.ROWS, 86: sm89.ROWS, 89: sm89.ROWS, 90: sm90.ROWS, 100: sm100.ROWS, 120: sm89.ROWS}

# In the interpreter: least queries and keys of a tile, see `interpreter_pace`.
LEAST_TILE: ContextVar[tuple[int, int] | None] = ContextVar("flashcore_least_tile", default=None)


def row_for(
    kernel: str,
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    *,
    gaps: bool = False,
    fp8: bool = False,
    full_columns: bool = False,
    ranges: bool = True,
) -> Row:
    """The row for a kernel on a GPU.

    Args:
        arch: compute capability as major * 10 + minor; 0: the interpreter.
        dtype: of query.
        head_dim: the larger of K's and V's.
        gaps: there is a dense mask, or a key range for each query (see `Row`).
        fp8: keys and values are in e4m3. Beside 16-bit queries a row of 8 bits serves them where there is one, else one
            of the queries' size does.
        full_columns: the head dimensions fill the columns of their tiles.
        ranges: there is a key range.

    Raises:
        LookupError: no row fits, which a test excludes for everything that `choose` accepts.
    """
    listed = [known for known in sorted(TABLES) if known <= arch]
    rows = TABLES[listed[-1] if listed else 80]
    bits = dtype.itemsize * 8
    for size in (8, bits) if fp8 and bits == 16 else (bits,):
        for row in rows:
            fits = head_dim <= row.head_dim and (full_columns or not row.full_columns) and (row.ranges or not ranges)
            if fits and (row.kernel, row.bits, row.gaps) == (kernel, size, gaps):
                return _widened(row) if arch == 0 else row
    raise LookupError(f"no configuration of {kernel} for sm_{arch}, {bits} bits, head_dim {head_dim}")


def _widened(row: Row) -> Row:
    least = LEAST_TILE.get()
    if least is None:
        return row
    queries, keys = least
    # The merge goes over all chunks that there may be.
    return row._replace(
        block_m=max(row.block_m, queries), block_n=max(row.block_n, keys), min_chunk=max(row.min_chunk, keys), chunks=4
    )

"""Shipped configurations: which tiles each kernel uses on which GPU. No tuning happens at run time.

One file an architecture, each row with the reason for it. `configuration` finds the row.
"""

import torch

from . import sm80, sm89, sm90, sm100
from .row import Row

# Compute capability -> table. A capability that is not listed takes the nearest listed one below it.
TABLES = {80: sm80.ROWS, 86: sm89.ROWS, 89: sm89.ROWS, 90: sm90.ROWS, 100: sm100.ROWS, 120: sm89.ROWS}


def configuration(
    kernel: str,
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    gaps: bool = False,
    fp8: bool = False,
    whole: bool = False,
    ranges: bool = True,
) -> Row:
    """The row for `kernel` on compute capability `arch` (0: the interpreter), element type and largest head_dim.

    `gaps`: keys between the first and the last that a tile sees may be seen by none of its rows (dense masks, a key
    range for each query). Such calls need registers for the mask, and have smaller tiles. `fp8`: keys and values are in
    e4m3; beside 16-bit queries a row of 8 bits serves them where there is one, else one of the queries' size does.
    `whole`: the head dimensions fill their tiles' columns. `ranges`: there is a key range.

    Raises:
        LookupError: no row fits, which a test excludes for everything that `plan` accepts.
    """
    listed = [known for known in sorted(TABLES) if known <= arch]
    rows = TABLES[listed[-1] if listed else 80]
    bits = dtype.itemsize * 8
    for size in (8, bits) if fp8 and bits == 16 else (bits,):
        for row in rows:
            fits = head_dim <= row.head_dim and (whole or not row.whole) and (row.ranges or not ranges)
            if fits and (row.kernel, row.bits, row.gaps) == (kernel, size, gaps):
                return row
    raise LookupError(f"no configuration of {kernel} for sm_{arch}, {bits} bits, head_dim {head_dim}")

"""Which tiles the portable backward's kernels use on which GPU. No tuning happens at run time, and no Triton is needed.

The reasons are what ptxas reports for the kernel, of Triton 3.9 and for 9.0 of 3.6 too: registers of a thread (255 are
all there are), bytes of spilled registers and how many loads and stores of them stand in loops. Compiled only: none has
been timed but where it says so.
"""

from typing import NamedTuple

from ..plan import padded
from ..problem import Problem


class BackwardRow(NamedTuple):
    """One configuration: for `kernel`, elements of `bits` bits and head dimensions up to `head_dim`.

    Attributes:
        kernel: "dq", "dkdv" or "mask".
        bits: of an element.
        head_dim: the larger of the head dimensions is at most this.
        block_m, block_n: queries and keys of a tile.
        num_warps, num_stages: of the launch.
        why: what speaks for it: a measurement, or the limit that forces it.
        plain: it stands before the others, and serves calls without softcap, dropout, dense mask and key ranges for
            each query: these take registers. A key range for each sequence is plain, so that a sequence has one row
            alone, batched and padded.
    """

    kernel: str
    bits: int
    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    why: str
    plain: bool = False


class BackwardConfig(NamedTuple):
    """How a call's backward runs: a row for each kernel, and the head dimensions padded to powers of two."""

    dq: BackwardRow
    dkdv: BackwardRow
    mask: BackwardRow
    block_d: int
    block_dv: int


def _row(kernel, bits, head_dim, tile, why, plain=False) -> BackwardRow:
    return BackwardRow(kernel, bits, head_dim, *tile, why=why, plain=plain)


# tile: (block_m, block_n, num_warps, num_stages)
SM80 = (
    _row(kernel="dq", bits=16, head_dim=64, tile=(64, 64, 4, 2), why="TODO", plain=True),
    _row(kernel="dq", bits=16, head_dim=128, tile=(64, 64, 8, 2), why="TODO", plain=True),
    _row(kernel="dq", bits=16, head_dim=256, tile=(64, 32, 8, 1), why="TODO", plain=True),
    _row(kernel="dq", bits=16, head_dim=128, tile=(32, 32, 4, 1), why="TODO"),
    _row(kernel="dq", bits=16, head_dim=256, tile=(32, 32, 8, 1), why="TODO"),
    _row(kernel="dq", bits=32, head_dim=128, tile=(32, 32, 8, 1), why="TODO"),
    _row(kernel="dq", bits=32, head_dim=256, tile=(32, 16, 8, 1), why="TODO"),
    _row(kernel="dkdv", bits=16, head_dim=64, tile=(64, 64, 4, 2), why="TODO", plain=True),
    _row(kernel="dkdv", bits=16, head_dim=128, tile=(64, 64, 8, 2), why="TODO", plain=True),
    _row(kernel="dkdv", bits=16, head_dim=256, tile=(32, 64, 8, 1), why="TODO", plain=True),
    _row(kernel="dkdv", bits=16, head_dim=128, tile=(32, 32, 4, 1), why="TODO"),
    _row(kernel="dkdv", bits=16, head_dim=256, tile=(32, 32, 8, 1), why="TODO"),
    _row(kernel="dkdv", bits=32, head_dim=128, tile=(32, 32, 8, 1), why="TODO"),
    _row(kernel="dkdv", bits=32, head_dim=256, tile=(16, 16, 8, 1), why="TODO"),
    _row(kernel="mask", bits=16, head_dim=256, tile=(32, 32, 8, 1), why="TODO"),
    _row(kernel="mask", bits=32, head_dim=256, tile=(32, 16, 8, 1), why="TODO"),
)
_SM90 = (
    _row(kernel="dq", bits=16, head_dim=64, tile=(128, 64, 8, 3), why="TODO", plain=True),
    _row(kernel="dq", bits=16, head_dim=128, tile=(128, 64, 8, 2), why="TODO", plain=True),
    _row(kernel="dq", bits=16, head_dim=256, tile=(128, 32, 8, 2), why="TODO", plain=True),
    _row(kernel="dq", bits=16, head_dim=128, tile=(64, 32, 8, 1), why="TODO"),
    _row(kernel="dkdv", bits=16, head_dim=64, tile=(64, 64, 4, 2), why="TODO", plain=True),
    _row(kernel="dkdv", bits=16, head_dim=128, tile=(64, 128, 8, 2), why="TODO", plain=True),
    _row(kernel="dkdv", bits=16, head_dim=256, tile=(32, 64, 8, 1), why="TODO", plain=True),
    _row(kernel="dkdv", bits=16, head_dim=128, tile=(32, 64, 8, 1), why="TODO"),
)
SM90 = _SM90 + tuple(row for row in SM80 if not row.plain or row.bits == 32)
# Compute capability -> table. A capability that is not listed takes the nearest listed one below it, and what is below
# all of them (the interpreter's 0) the first.
TABLES = {80: SM80, 90: SM90, 100: SM80}


def backward_config(problem: Problem, arch: int, dropout: bool = False) -> BackwardConfig:
    """The rows for a call on compute capability `arch` (0: the interpreter).

    Raises:
        LookupError: no row fits, which a test excludes for everything that the kernels take.
    """
    listed = [known for known in TABLES if known <= arch]
    rows = TABLES[listed[-1] if listed else 80]
    plain = not (problem.softcap or dropout or problem.mask_kind or problem.range_layout == "rows")
    return BackwardConfig(
        *(_find(rows, kernel, problem, plain) for kernel in ("dq", "dkdv", "mask")),
        *(_columns(size, problem, arch) for size in (problem.head_dim, problem.value_dim)),
    )


def _find(rows: tuple[BackwardRow, ...], kernel: str, problem: Problem, plain: bool) -> BackwardRow:
    head, bits = max(problem.head_dim, problem.value_dim), problem.dtype.itemsize * 8
    for row in rows:
        if (row.kernel, row.bits) == (kernel, bits) and head <= row.head_dim and (plain or not row.plain):
            return row
    raise LookupError(f"no configuration of {kernel} for {bits} bits, head_dim {head}")


def _columns(size: int, problem: Problem, arch: int) -> int:
    """A head dimension padded to what the tile has: see plan.value_columns for the one that Hopper must not have."""
    columns = max(padded(size), 16)
    if columns == 32 and size != 32 and arch // 10 == 9 and problem.dtype.itemsize == 2:
        return 64
    return columns

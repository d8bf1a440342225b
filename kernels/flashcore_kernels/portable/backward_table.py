"""Which tiles the portable backward's kernels use on which GPU. No tuning happens at run time, and no Triton is needed.

TODO
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
        looks: it serves calls with a dense mask, whose tiles need registers for it, and only those.
    """

    kernel: str
    bits: int
    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    why: str
    looks: bool = False


class BackwardConfig(NamedTuple):
    """How a call's backward runs: a row for each kernel, and the head dimensions padded to powers of two."""

    dq: BackwardRow
    dkdv: BackwardRow
    mask: BackwardRow
    block_d: int
    block_dv: int


ROWS = (
    BackwardRow("dq", 16, 64, 128, 64, 8, 3, ""),
    BackwardRow("dq", 16, 128, 128, 64, 8, 2, ""),
    BackwardRow("dq", 16, 256, 64, 32, 8, 1, ""),
    BackwardRow("dkdv", 16, 64, 64, 64, 4, 2, ""),
    BackwardRow("dkdv", 16, 128, 64, 128, 8, 2, ""),
    BackwardRow("dkdv", 16, 256, 32, 64, 8, 1, ""),
    BackwardRow("dq", 32, 256, 32, 16, 8, 1, ""),
    BackwardRow("dkdv", 32, 256, 16, 16, 8, 1, ""),
    BackwardRow("mask", 16, 256, 64, 32, 8, 1, ""),
    BackwardRow("mask", 32, 256, 32, 16, 8, 1, ""),
)


def backward_config(problem: Problem, arch: int) -> BackwardConfig:
    rows = {}
    head = max(problem.head_dim, problem.value_dim)
    for kernel in ("dq", "dkdv", "mask"):
        rows[kernel] = next(
            r for r in ROWS if r.kernel == kernel and r.bits == 8 * problem.dtype.itemsize and head <= r.head_dim
        )
    return BackwardConfig(
        rows["dq"], rows["dkdv"], rows["mask"], max(padded(problem.head_dim), 16), max(padded(problem.value_dim), 16)
    )

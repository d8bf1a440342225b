"""Which calls the portable kernels serve, and with which tiles: all that no other family takes."""

from typing import NamedTuple

from ..device import Device
from ..plan import Plan, is_decode, power_of_2_from, why_decode, why_not_decode
from ..problem import Problem
from .tables import row_for


class ForwardConfig(NamedTuple):
    """How `flashcore_forward` runs.

    Attributes:
        block_m, block_n: rows of a tile, keys of a block.
        block_d, block_dv: columns of K's and V's tiles, powers of two.
        block_d1, block_dv1: columns of a second tile behind them, 0 where there is none (see `two_powers`).
        num_warps, num_stages: of the launch.
    """

    block_m: int
    block_n: int
    block_d: int
    block_dv: int
    block_d1: int
    block_dv1: int
    num_warps: int
    num_stages: int


class DecodeConfig(NamedTuple):
    """How `flashcore_decode` runs.

    Attributes:
        block_m, block_n: rows of a tile (query tokens x group), keys of a block.
        block_d, block_dv: head_dim and value_dim padded to powers of two.
        num_warps, num_stages: of the launch.
        min_chunk, max_chunks: least keys of a chunk, most chunks of a sequence (a power of two).
    """

    block_m: int
    block_n: int
    block_d: int
    block_dv: int
    num_warps: int
    num_stages: int
    min_chunk: int
    max_chunks: int


def choose_decode(problem: Problem, device: Device) -> Plan | None:
    """`flashcore_decode`, for few queries; e4m3 keys and dropout are not for it."""
    if not is_decode(problem) or problem.fp8 or problem.dropout:
        return None
    row = row_for(
        "flashcore_decode", device.arch, problem.dtype, _largest(problem), gaps=problem.mask_kind is not None,
        full_columns=_fills(problem, _columns(problem, device)), ranges=problem.range_layout is not None,
    )  # fmt: skip
    block_d, block_dv = _columns(problem, device)
    config = DecodeConfig(
        # One tile holds the whole group and all query tokens where it can; 16 is tl.dot's least.
        block_m=min(max(power_of_2_from(problem.num_queries * problem.group), 16), row.block_m),
        block_n=row.block_n, block_d=block_d, block_dv=block_dv, num_warps=row.num_warps, num_stages=row.num_stages,
        min_chunk=row.min_chunk, max_chunks=power_of_2_from(-(-row.chunks // problem.num_kv_heads)),
    )  # fmt: skip
    return Plan("flashcore_decode", why_decode(problem), config)


def choose_forward(problem: Problem, device: Device) -> Plan:
    """`flashcore_forward`, for everything."""
    # A mask that all queries share is no more than a KeyRange with holes.
    gaps = problem.mask_kind is not None and problem.mask_rows or problem.range_layout == "rows"
    keys, values = ((columns, 0) for columns in _columns(problem, device))
    # Only where asynchronous copies bring K and V, and nothing hides keys. Of tiles of 32 columns that come by way of
    # registers (single elements, fp8, calls with gaps) wrong code was seen on 9.0, see `value_columns`.
    copied = problem.aligned and not problem.fp8 and problem.mask_kind is None and problem.range_layout is None
    if problem.dtype.itemsize == 2 and copied:
        keys, values = two_powers(problem.head_dim) or keys, two_powers(problem.value_dim) or values
    row = row_for(
        "flashcore_forward", device.arch, problem.dtype, _largest(problem), gaps=gaps, fp8=problem.fp8,
        full_columns=_fills(problem, (sum(keys), sum(values))),
        ranges=problem.range_layout is not None or problem.mask_kind is not None,
    )  # fmt: skip
    config = ForwardConfig(
        block_m=row.block_m, block_n=row.block_n, block_d=keys[0], block_dv=values[0], block_d1=keys[1],
        block_dv1=values[1], num_warps=row.num_warps, num_stages=row.num_stages,
    )  # fmt: skip
    return Plan("flashcore_forward", why_not_decode(problem), config)


def _largest(problem: Problem) -> int:
    return max(problem.head_dim, problem.value_dim)


def _columns(problem: Problem, device: Device) -> tuple[int, int]:
    """Columns of K's and V's tiles, where each is one tile."""
    return max(power_of_2_from(problem.head_dim), 16), value_columns(problem, device)


def _fills(problem: Problem, columns: tuple[int, int]) -> bool:
    return columns == (problem.head_dim, problem.value_dim)


def two_powers(size: int) -> tuple[int, int] | None:
    """Two powers of two that are together `size`, or None where there are none that tl.dot takes.

    96 columns in tiles of 64 and 32 are a quarter less work than in tiles of 128.
    """
    first = power_of_2_from(size + 1) // 2
    rest = size - first
    return (first, rest) if rest >= 16 and power_of_2_from(rest) == rest else None


def value_columns(problem: Problem, device: Device) -> int:
    """value_dim padded to what the tile has: a power of two, at least 16.

    Tiles of 32 columns that are not all there are avoided on Hopper: where neither K's nor V's rows can be loaded by
    vectors, ptxas 12.8 (which Triton 3.6 brings) makes wrong machine code of the wgmma loop. 12.9 does not.
    """
    columns = max(power_of_2_from(problem.value_dim), 16)
    if columns == 32 and problem.value_dim != 32 and device.arch // 10 == 9 and problem.dtype.itemsize == 2:
        return 64
    return columns

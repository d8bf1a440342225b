"""Which tiles the portable backward's kernels use on which GPU. No tuning happens at run time, and no Triton is needed.

The reasons are what ptxas reports for the kernel with what a row serves: registers of a thread (255 are all there are),
and bytes of spilled ones. Triton 3.9, and 3.6 for 9.0. They are compiled only, and have not been timed, but where
microseconds stand: of that kernel alone, in bf16, on an H200 with Triton 3.6.
"""

from typing import NamedTuple

from ..device import Device
from ..plan import Plan, power_of_2_from
from ..problem import Problem

# Tiles of whole rows: wider ones leave no registers.
MAX_BACKWARD_HEAD_DIM = 256


class BackwardRow(NamedTuple):
    """One configuration: for `kernel`, elements of `bits` bits and head dimensions up to `head_dim`.

    Attributes:
        kernel: "dq", "dkdv" or "mask" (which also serves `flashcore_backward_shift`).
        bits: of an element.
        head_dim: the larger of the head dimensions is at most this.
        tile: queries and keys of a tile, then num_warps and num_stages of the launch.
        why: what speaks for it: a measurement, or the limit that forces it.
        serves: "plain" calls, "rows" (a key range for each query), "dropout" alone, "bias" alone (an additive mask),
            "busy" ones (softcap, a bool mask, whatever comes beside another: all take registers), or "all". A key
            range for each sequence is plain, so that a sequence has one row alone, batched and padded.
        branch: jump over the checks of blocks that are not at an edge. By wgmma that saves instructions; by mma.sync
            it has all of a block's operands in registers at the jump.
    """

    kernel: str
    bits: int
    head_dim: int
    tile: tuple[int, int, int, int]
    why: str
    serves: str = "all"
    branch: bool = False

    @property
    def block_m(self) -> int:
        return self.tile[0]

    @property
    def block_n(self) -> int:
        return self.tile[1]

    @property
    def num_warps(self) -> int:
        return self.tile[2]

    @property
    def num_stages(self) -> int:
        return self.tile[3]


class BackwardConfig(NamedTuple):
    """How a call's backward runs: a row for each kernel, and the head dimensions padded to powers of two."""

    dq: BackwardRow
    dkdv: BackwardRow
    mask: BackwardRow
    block_d: int
    block_dv: int


SM80 = (
    BackwardRow(
        kernel="dq", bits=16, head_dim=64, tile=(64, 64, 4, 2), serves="plain", why="255 registers, no spills, 33 KiB"
    ),
    BackwardRow(
        kernel="dq",
        bits=16,
        head_dim=128,
        tile=(64, 64, 8, 2),
        serves="plain",
        why="255 registers, no spills, 72 KiB; 4 warps spill 256 bytes",
    ),
    BackwardRow(
        kernel="dq",
        bits=16,
        head_dim=256,
        tile=(32, 32, 8, 1),
        serves="plain",
        why="176 registers; 64x32 takes 255 and 96 KiB",
    ),
    BackwardRow(kernel="dq", bits=16, head_dim=64, tile=(32, 32, 4, 1), why="209 registers"),
    BackwardRow(
        kernel="dq",
        bits=16,
        head_dim=256,
        tile=(32, 32, 8, 1),
        why="222 registers; a tile of 64 queries has none left for a mask",
    ),
    BackwardRow(kernel="dq", bits=32, head_dim=128, tile=(32, 32, 8, 1), why="181 registers, 52 KiB"),
    BackwardRow(kernel="dq", bits=32, head_dim=256, tile=(32, 16, 8, 1), why="182 registers, 82 KiB"),
    BackwardRow(
        kernel="dkdv",
        bits=16,
        head_dim=64,
        tile=(64, 64, 8, 2),
        serves="plain",
        why="255 registers, no spills, 33 KiB; 4 warps spill 40 bytes",
    ),
    BackwardRow(
        kernel="dkdv",
        bits=16,
        head_dim=128,
        tile=(64, 64, 8, 2),
        serves="plain",
        why="255 registers, no spills, 72 KiB; 4 warps spill 144 bytes",
    ),
    BackwardRow(
        kernel="dkdv",
        bits=16,
        head_dim=256,
        tile=(32, 32, 8, 1),
        serves="plain",
        why="176 registers, 80 KiB; 32x64 takes 255 and 112 KiB",
    ),
    BackwardRow(kernel="dkdv", bits=16, head_dim=64, tile=(32, 32, 4, 1), why="168 registers"),
    BackwardRow(kernel="dkdv", bits=16, head_dim=256, tile=(32, 32, 8, 1), why="255 registers, no spills, 80 KiB"),
    BackwardRow(kernel="dkdv", bits=32, head_dim=128, tile=(32, 32, 8, 1), why="186 registers, 68 KiB"),
    BackwardRow(kernel="dkdv", bits=32, head_dim=256, tile=(16, 16, 8, 1), why="209 registers, 65 KiB"),
    BackwardRow(kernel="mask", bits=16, head_dim=128, tile=(32, 16, 8, 1), why="205 registers; 32x32 spills 120 bytes"),
    BackwardRow(
        kernel="mask", bits=16, head_dim=256, tile=(16, 16, 4, 1), why="255 registers, 48 bytes spill; 32x32 spills 592"
    ),
    BackwardRow(kernel="mask", bits=32, head_dim=256, tile=(32, 16, 8, 1), why="255 registers, 24 bytes spill"),
)
_SM90 = (
    BackwardRow(
        kernel="dq",
        bits=16,
        head_dim=64,
        tile=(64, 64, 4, 3),
        serves="plain",
        branch=True,
        why="B4 S4096, causal and full, 817, 1472 us; 128x64 with 8 warps 1053, 1870; 2 stages 985, 1706",
    ),
    BackwardRow(
        kernel="dq",
        bits=16,
        head_dim=128,
        tile=(128, 64, 8, 3),
        serves="plain",
        branch=True,
        why="B4 S4096 of 32:8 heads, causal and full, 1463, 2603 us; 2 stages 1750, 3044; 64x64, 4 warps 1580, 2849",
    ),
    BackwardRow(
        kernel="dq",
        bits=16,
        head_dim=256,
        tile=(128, 32, 8, 2),
        serves="plain",
        branch=True,
        why="233 registers, none spills in its main loop",
    ),
    BackwardRow(
        kernel="dq",
        bits=16,
        head_dim=64,
        tile=(64, 64, 4, 1),
        serves="rows",
        why="242 registers; 2 stages serialise wgmma at head_dim 128",
    ),
    BackwardRow(
        kernel="dq",
        bits=16,
        head_dim=128,
        tile=(64, 64, 8, 1),
        serves="rows",
        why="255 registers, no spills in loops; 128x64 spills 88 bytes, and in 2 stages serialises wgmma",
    ),
    BackwardRow(
        kernel="dq",
        bits=16,
        head_dim=64,
        tile=(64, 64, 4, 2),
        serves="dropout",
        branch=True,
        why="670 instructions a block, none spills",
    ),
    BackwardRow(
        kernel="dq",
        bits=16,
        head_dim=128,
        tile=(128, 64, 8, 2),
        serves="dropout",
        branch=True,
        why="726 instructions a block, none spills",
    ),
    BackwardRow(kernel="dq", bits=16, head_dim=64, tile=(64, 32, 4, 1), why="255 registers, no spills"),
    BackwardRow(
        kernel="dq",
        bits=16,
        head_dim=128,
        tile=(64, 32, 8, 1),
        why="255 registers, no spills; 2 stages serialise wgmma with dropout",
    ),
    BackwardRow(
        kernel="dkdv",
        bits=16,
        head_dim=64,
        tile=(64, 64, 4, 3),
        serves="plain",
        branch=True,
        why="B4 S4096, causal and full, 1572, 3008 us; 2 stages 1625, 3427; 64x128 with 8 warps 1797, 3341",
    ),
    BackwardRow(
        kernel="dkdv",
        bits=16,
        head_dim=128,
        tile=(64, 128, 8, 3),
        serves="plain",
        branch=True,
        why="B4 S4096 of 32:8 heads, causal and full, 2735, 5176 us; 2 stages 2951, 6148; 64x64, 4 warps 3032, 5941",
    ),
    BackwardRow(
        kernel="dkdv",
        bits=16,
        head_dim=256,
        tile=(32, 64, 8, 1),
        serves="plain",
        branch=True,
        why="255 registers, no spills; with a key range 568 bytes, with Triton 3.9 216 without one; 64x64 spills 152",
    ),
    BackwardRow(
        kernel="dkdv", bits=16, head_dim=64, tile=(64, 64, 4, 1), serves="rows", branch=True, why="252 registers"
    ),
    BackwardRow(
        kernel="dkdv",
        bits=16,
        head_dim=128,
        tile=(64, 128, 8, 2),
        serves="rows",
        branch=True,
        why="255 registers, 8 spills in the loop; 64x64 with 8 warps takes 254, none",
    ),
    BackwardRow(
        kernel="dkdv",
        bits=16,
        head_dim=64,
        tile=(64, 64, 4, 2),
        serves="dropout",
        branch=True,
        why="1380 instructions a block, 2 spill",
    ),
    BackwardRow(
        kernel="dkdv",
        bits=16,
        head_dim=128,
        tile=(64, 64, 8, 2),
        serves="dropout",
        branch=True,
        why="1538 instructions a block, 6 spill; 64x128 spills 44",
    ),
    BackwardRow(
        kernel="dq",
        bits=16,
        head_dim=64,
        tile=(64, 64, 4, 2),
        serves="bias",
        why="247 registers, no spills, and two programs an SM: 114 us of T5-large's layers on average where 32x32, by "
        "mma.sync, took 173",
    ),
    BackwardRow(
        kernel="mask",
        bits=16,
        head_dim=64,
        tile=(64, 32, 4, 2),
        serves="bias",
        why="255 registers, no spills in the loop, and two programs an SM; 64x64 with 4 warps spills 69 in it. 223 us "
        "of T5-large's layers on average, 16 x 512 tokens with 16 heads, where 32x16 took 863",
    ),
    BackwardRow(
        kernel="mask",
        bits=16,
        head_dim=128,
        tile=(64, 32, 8, 2),
        serves="bias",
        why="254 registers, no spills; 4 warps spill 9 in the loop",
    ),
    BackwardRow(
        kernel="dkdv",
        bits=16,
        head_dim=64,
        tile=(32, 64, 4, 1),
        why="255 registers, no spills; beside a bias 64x64 with 8 warps took a quarter longer",
    ),
    BackwardRow(
        kernel="dkdv",
        bits=16,
        head_dim=128,
        tile=(32, 64, 8, 1),
        why="255 registers, 3 spills in the loop with dropout, else none",
    ),
)
# What is left is by mma.sync here too.
SM90 = _SM90 + tuple(row for row in SM80 if row.serves == "all")
SM100 = (
    BackwardRow(
        kernel="dq",
        bits=16,
        head_dim=64,
        tile=(64, 64, 8, 2),
        serves="plain",
        why="172 registers; with 4 warps 160 bytes spill",
    ),
) + SM80
# Compute capability -> table. A capability that is not listed takes the nearest listed one below it, and what is below
# all of them (the interpreter's 0) the first.
TABLES = {80: SM80, 90: SM90, 100: SM100, 120: SM80}


def choose_portable_backward(problem: Problem, device: Device) -> Plan:
    """`flashcore_backward`, for everything."""
    return Plan("flashcore_backward", "gradients are asked for", backward_config(problem, device.arch))


def backward_config(problem: Problem, arch: int) -> BackwardConfig:
    """The rows for a call on compute capability `arch` (0: the interpreter).

    Raises:
        LookupError: no row fits, which a test excludes for everything that the kernels take.
    """
    listed = [known for known in TABLES if known <= arch]
    rows = TABLES[listed[-1] if listed else 80]
    takes = [name for name, asked in (
        ("rows", problem.range_layout == "rows"), ("dropout", problem.dropout), ("bias", problem.mask_kind == "float"),
        ("busy", problem.softcap or problem.mask_kind == "bool"),
    ) if asked]  # fmt: skip
    kind = "busy" if len(takes) > 1 else (takes or ["plain"])[0]
    return BackwardConfig(
        *(_find(rows, kernel, problem, kind) for kernel in ("dq", "dkdv", "mask")),
        *(_columns(size, problem, arch) for size in (problem.head_dim, problem.value_dim)),
    )


def _find(rows: tuple[BackwardRow, ...], kernel: str, problem: Problem, kind: str) -> BackwardRow:
    head, bits = max(problem.head_dim, problem.value_dim), problem.dtype.itemsize * 8
    for row in rows:
        if (row.kernel, row.bits) == (kernel, bits) and head <= row.head_dim and row.serves in (kind, "all"):
            return row
    raise LookupError(f"no configuration of {kernel} for {bits} bits, head_dim {head}")


def _columns(size: int, problem: Problem, arch: int) -> int:
    """A head dimension padded to what the tile has: see plan.value_columns for the one that Hopper must not have."""
    columns = max(power_of_2_from(size), 16)
    if columns == 32 and size != 32 and arch // 10 == 9 and problem.dtype.itemsize == 2:
        return 64
    return columns

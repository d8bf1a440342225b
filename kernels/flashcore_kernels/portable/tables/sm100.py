"""Configurations for compute capability 10.0 (B200: 227 KiB of shared memory a block, tcgen05).

Those of 9.0, compiled for 10.0 and free of spills there too, but for the rows below. None has been timed.
"""

from .row import Row
from .sm90 import ROWS as SM90

_OWN = (
    Row(
        kernel="flashcore_forward",
        bits=16,
        head_dim=64,
        block_m=128,
        block_n=32,
        num_warps=8,
        num_stages=3,
        why="154 registers, 41 KiB; 128x64 spills 32 bytes at head_dim 40",
    ),
    Row(
        kernel="flashcore_forward",
        bits=16,
        head_dim=128,
        block_m=128,
        block_n=32,
        num_warps=8,
        num_stages=3,
        why="174 registers, 81 KiB; 128x64 spills 24 bytes",
    ),
    Row(
        kernel="flashcore_forward",
        bits=16,
        head_dim=256,
        block_m=64,
        block_n=32,
        num_warps=8,
        num_stages=2,
        why="182 registers, 97 KiB; 128x32 spills 24 bytes",
    ),
    Row(
        kernel="flashcore_forward",
        bits=16,
        head_dim=512,
        block_m=32,
        block_n=32,
        num_warps=8,
        num_stages=2,
        why="180 registers, 98 KiB; 32x64 spills 112 bytes",
    ),
    Row(
        kernel="flashcore_forward",
        bits=8,
        head_dim=128,
        block_m=64,
        block_n=64,
        num_warps=4,
        num_stages=3,
        full_columns=True,
        why="254 registers, 40 KiB; 128x64 spills 80 bytes",
    ),
    Row(
        kernel="flashcore_forward",
        bits=8,
        head_dim=128,
        block_m=128,
        block_n=64,
        num_warps=8,
        num_stages=3,
        why="as for 9.0, never timed",
    ),
    Row(
        kernel="flashcore_forward",
        bits=8,
        head_dim=256,
        block_m=64,
        block_n=64,
        num_warps=8,
        num_stages=2,
        why="220 registers, 128 KiB; 128x32 spills 16 bytes in its loops",
    ),
)

_REPLACED = {(row.kernel, row.bits) for row in _OWN}
ROWS = _OWN + tuple(row for row in SM90 if row.gaps or (row.kernel, row.bits) not in _REPLACED)

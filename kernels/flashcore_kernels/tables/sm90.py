"""Configurations for compute capability 9.0 (H100, H200: 227 KiB of shared memory a block, wgmma).

Registers and bytes are those that ptxas reports for the kernel with every feature that the row serves, Triton 3.9.
"""

from .row import Row

ROWS = (
    Row("flashcore_forward", 16, 64, 128, 64, 8, 3, "seed"),
    Row("flashcore_forward", 16, 128, 128, 64, 8, 3, "seed"),
    Row("flashcore_forward", 16, 256, 128, 32, 8, 2, "seed"),
    Row("flashcore_forward", 32, 64, 64, 32, 8, 2, "seed"),
    Row("flashcore_forward", 32, 128, 32, 16, 8, 1, "seed"),
    Row("flashcore_forward", 32, 256, 32, 16, 8, 1, "seed"),
    Row("flashcore_forward", 16, 64, 64, 32, 8, 1, "seed", gaps=True),
    Row("flashcore_forward", 16, 128, 64, 32, 8, 1, "seed", gaps=True),
    Row("flashcore_forward", 16, 256, 32, 32, 8, 1, "seed", gaps=True),
    Row("flashcore_forward", 32, 64, 64, 32, 8, 2, "seed", gaps=True),
    Row("flashcore_forward", 32, 128, 32, 16, 8, 1, "seed", gaps=True),
    Row("flashcore_forward", 32, 256, 16, 16, 8, 1, "seed", gaps=True),
    Row("flashcore_decode", 16, 64, 64, 64, 4, 3, "seed"),
    Row("flashcore_decode", 16, 128, 32, 64, 4, 3, "seed"),
    Row("flashcore_decode", 16, 256, 16, 32, 4, 2, "seed", min_blocks=4),
    Row("flashcore_decode", 32, 64, 16, 64, 4, 2, "seed"),
    Row("flashcore_decode", 32, 128, 16, 32, 4, 2, "seed", min_blocks=4),
    Row("flashcore_decode", 32, 256, 16, 16, 4, 1, "seed", min_blocks=8),
    Row("flashcore_decode", 16, 64, 32, 64, 4, 3, "seed", gaps=True),
    Row("flashcore_decode", 16, 128, 16, 32, 4, 2, "seed", min_blocks=4, gaps=True),
    Row("flashcore_decode", 16, 256, 16, 32, 4, 1, "seed", min_blocks=4, gaps=True),
    Row("flashcore_decode", 32, 64, 16, 32, 4, 1, "seed", min_blocks=4, gaps=True),
    Row("flashcore_decode", 32, 128, 16, 32, 4, 1, "seed", min_blocks=4, gaps=True),
    Row("flashcore_decode", 32, 256, 16, 16, 4, 1, "seed", min_blocks=8, gaps=True),
)

"""Configurations for compute capability 8.0 (A100: 163 KiB of shared memory a block, mma.sync).

The reasons are what ptxas reports for the kernel with every feature that a row serves: registers of a thread (255 are
all there are), and bytes of shared memory or of spilled registers. Triton 3.9; 3.6 agrees unless it is named.
"""

from .row import Row

ROWS = (
    Row("flashcore_forward", 16, 64, 128, 64, 8, 2, "202 registers, 32 KiB; 3 stages spill 8 bytes on Triton 3.6"),
    Row("flashcore_forward", 16, 128, 128, 32, 8, 3, "223 registers, 64 KiB; 128x64 takes 255, on 3.6 spills 48"),
    Row("flashcore_forward", 16, 256, 64, 32, 8, 2, "224 registers, 68 KiB; 128x32 spills 312 bytes"),
    Row("flashcore_forward", 32, 64, 64, 32, 8, 2, "128 registers, 40 KiB; 64x64 spills 176 bytes"),
    Row("flashcore_forward", 32, 128, 32, 32, 8, 2, "80 registers, 52 KiB; 4 warps take 255 and spill 24 bytes"),
    Row("flashcore_forward", 32, 256, 32, 16, 8, 1, "106 registers, 50 KiB"),
    Row("flashcore_forward", 16, 64, 64, 32, 8, 2, "255 registers; 128x32 spills 24 bytes", gaps=True),
    Row("flashcore_forward", 16, 128, 64, 32, 8, 2, "239 registers; 128x32 spills 216 bytes, 64x64 96", gaps=True),
    Row("flashcore_forward", 16, 256, 32, 32, 8, 1, "166 registers; 64x32 takes 254, with 2 stages spills", gaps=True),
    Row("flashcore_forward", 32, 64, 64, 32, 8, 2, "184 registers, 48 KiB; 64x64 spills 152 bytes", gaps=True),
    Row("flashcore_forward", 32, 128, 32, 16, 8, 1, "80 registers, 26 KiB; fits three blocks an SM", gaps=True),
    Row("flashcore_forward", 32, 256, 16, 16, 8, 1, "103 registers; 32x16 spills 16 bytes", gaps=True),
    Row("flashcore_decode", 16, 64, 64, 64, 4, 3, "168 registers, 24 KiB; 128 keys take 255"),
    Row("flashcore_decode", 16, 128, 32, 64, 4, 3, "186 registers, 44 KiB; 64 rows spill 40 bytes"),
    Row("flashcore_decode", 16, 256, 16, 32, 4, 2, "168 registers, 41 KiB; 32 rows spill 16 bytes", min_blocks=4),
    Row("flashcore_decode", 32, 64, 16, 64, 4, 2, "80 registers, 40 KiB: six blocks an SM by registers"),
    Row("flashcore_decode", 32, 128, 16, 32, 4, 2, "120 registers, 42 KiB", min_blocks=4),
    Row("flashcore_decode", 32, 256, 16, 16, 4, 1, "190 registers, 33 KiB; 8 warps spill 8 bytes", min_blocks=8),
    Row("flashcore_decode", 16, 64, 32, 64, 4, 3, "199 registers; 64 rows take 255, 128 keys spill 6 KiB", gaps=True),
    Row("flashcore_decode", 16, 128, 16, 32, 4, 2, "168 registers, 22 KiB", min_blocks=4, gaps=True),
    Row("flashcore_decode", 16, 256, 16, 32, 4, 1, "196 registers; 2 stages spill 8 bytes", min_blocks=4, gaps=True),
    Row("flashcore_decode", 32, 64, 16, 32, 4, 1, "128 registers, 14 KiB", min_blocks=4, gaps=True),
    Row("flashcore_decode", 32, 128, 16, 32, 4, 1, "142 registers, 26 KiB", min_blocks=4, gaps=True),
    Row("flashcore_decode", 32, 256, 16, 16, 4, 1, "193 registers, 33 KiB", min_blocks=8, gaps=True),
)

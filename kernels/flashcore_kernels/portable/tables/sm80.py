"""Configurations for compute capability 8.0 (A100: 163 KiB of shared memory a block, mma.sync).

The reasons are what ptxas reports for the kernel with every feature that a row serves: registers of a thread (255 are
all there are), and bytes of shared memory or of spilled registers. Triton 3.9; 3.6 agrees unless it is named. Spills
outside of the loops do not count. None has been timed.
"""

from .row import Row

ROWS = (
    Row("flashcore_forward", 16, 64, 128, 64, 8, 2, "193 registers, 48 KiB; 128x128 takes 255"),
    Row("flashcore_forward", 16, 128, 128, 32, 8, 3, "225 registers, 72 KiB; 128x64 takes 255"),
    Row("flashcore_forward", 16, 256, 64, 32, 8, 2, "225 registers, 68 KiB; 128x32 spills 216 bytes"),
    Row("flashcore_forward", 32, 64, 32, 32, 4, 2, "128 registers, 28 KiB: four blocks an SM; 64x32 spills 64 bytes"),
    Row("flashcore_forward", 32, 128, 32, 32, 8, 2, "106 registers, 52 KiB; 64x32 spills 64 bytes, 64x16 takes 255"),
    Row("flashcore_forward", 32, 256, 32, 16, 8, 2, "178 registers, 66 KiB; 32x32 spills 40 bytes"),
    Row("flashcore_forward", 16, 64, 64, 32, 8, 2, "253 registers, 24 KiB; 64x64 takes 255", gaps=True),
    Row("flashcore_forward", 16, 128, 64, 32, 8, 2, "240 registers; 128x32 spills 144 bytes, 64x64 104", gaps=True),
    Row("flashcore_forward", 16, 256, 32, 32, 8, 2, "183 registers, 52 KiB; 64x32 with 1 stage takes 254", gaps=True),
    Row("flashcore_forward", 32, 64, 32, 32, 8, 2, "147 registers, 32 KiB; 64x32 spills 96 bytes", gaps=True),
    Row("flashcore_forward", 32, 128, 32, 16, 8, 2, "156 registers, 36 KiB; 32x32 spills up to 40 bytes", gaps=True),
    Row("flashcore_forward", 32, 256, 32, 16, 8, 2, "180 registers, 68 KiB; 32x32 with 1 stage spills 8", gaps=True),
    Row("flashcore_decode", 16, 64, 64, 64, 4, 3, "168 registers, 24 KiB; 128 keys take 255"),
    Row("flashcore_decode", 16, 128, 32, 64, 4, 3, "190 registers, 44 KiB; 64 rows spill 40 bytes"),
    Row("flashcore_decode", 16, 256, 16, 32, 4, 2, "168 registers, 41 KiB: three blocks an SM"),
    Row("flashcore_decode", 32, 64, 16, 64, 4, 2, "80 registers, 40 KiB: three blocks an SM"),
    Row("flashcore_decode", 32, 128, 16, 32, 4, 2, "107 registers, 42 KiB: three blocks an SM"),
    Row("flashcore_decode", 32, 256, 16, 16, 8, 2, "128 registers, 49 KiB: two blocks an SM"),
    Row("flashcore_decode", 16, 64, 32, 32, 4, 3, "246 registers; 64 keys spill on 3.6", gaps=True),
    Row("flashcore_decode", 16, 128, 16, 32, 4, 2, "168 registers, 22 KiB; 64 keys take 255", gaps=True),
    Row("flashcore_decode", 16, 256, 16, 32, 4, 2, "168 registers, 42 KiB: 3 blocks an SM", gaps=True),
    Row("flashcore_decode", 32, 64, 16, 64, 4, 2, "114 registers, 44 KiB; 1 stage spills 120 bytes", gaps=True),
    Row("flashcore_decode", 32, 128, 16, 32, 4, 2, "154 registers, 44 KiB: 3 blocks an SM", gaps=True),
    Row("flashcore_decode", 32, 256, 16, 16, 8, 2, "128 registers, 50 KiB: two blocks an SM", gaps=True),
)

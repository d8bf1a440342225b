"""Configurations for compute capability 9.0 (H100, H200: 227 KiB of shared memory a block, wgmma).

The reasons are what ptxas reports for the kernel with every feature that a row serves: registers of a thread (255 are
all there are), and bytes of shared memory or of spilled registers. Triton 3.9; 3.6 agrees. A spill costs double here:
ptxas then waits for each wgmma by itself.
"""

from .row import Row

ROWS = (
    Row("flashcore_forward", 16, 64, 128, 64, 8, 3, "192 registers, 64 KiB; 128x128 spills 40 bytes, 4 warps 16"),
    Row("flashcore_forward", 16, 128, 128, 64, 8, 3, "229 registers, 128 KiB; 128x128 spills 144 bytes"),
    Row("flashcore_forward", 16, 256, 128, 32, 8, 2, "239 registers, 128 KiB; 64x64 takes 254 and 161 KiB"),
    Row("flashcore_forward", 32, 64, 64, 32, 8, 2, "108 registers, 40 KiB; 64x64 spills 400 bytes"),
    Row("flashcore_forward", 32, 128, 32, 32, 8, 2, "92 registers, 52 KiB"),
    Row("flashcore_forward", 32, 256, 32, 16, 8, 1, "122 registers, 50 KiB"),
    Row("flashcore_forward", 16, 64, 64, 32, 8, 1, "206 registers; 2 stages wait for each wgmma by itself", gaps=True),
    Row("flashcore_forward", 16, 128, 64, 32, 8, 1, "228 registers; 2 stages serialise wgmma, 64x64 spills", gaps=True),
    Row("flashcore_forward", 16, 256, 32, 32, 8, 1, "157 registers, by mma.sync; 64x32 spills 168 bytes", gaps=True),
    Row("flashcore_forward", 32, 64, 64, 32, 8, 2, "186 registers, 48 KiB", gaps=True),
    Row("flashcore_forward", 32, 128, 32, 16, 8, 1, "80 registers; 32x32 with 4 warps spills 648 bytes", gaps=True),
    Row("flashcore_forward", 32, 256, 16, 16, 8, 1, "88 registers; 32x16 spills 24 bytes", gaps=True),
    Row("flashcore_decode", 16, 64, 64, 64, 4, 3, "181 registers, 40 KiB; 128 keys take 244 and 104 KiB"),
    Row("flashcore_decode", 16, 128, 32, 64, 4, 3, "197 registers, 44 KiB; 64 rows take 244 and 80 KiB"),
    Row("flashcore_decode", 16, 256, 16, 32, 4, 2, "152 registers, 41 KiB: three blocks an SM", min_blocks=4),
    Row("flashcore_decode", 32, 64, 16, 64, 4, 2, "87 registers, 40 KiB: five blocks an SM"),
    Row("flashcore_decode", 32, 128, 16, 32, 4, 2, "104 registers, 42 KiB", min_blocks=4),
    Row("flashcore_decode", 32, 256, 16, 16, 4, 1, "146 registers, 33 KiB", min_blocks=8),
    Row("flashcore_decode", 16, 64, 32, 64, 4, 3, "194 registers; 64 rows take 250, 128 keys spill 2 KiB", gaps=True),
    Row("flashcore_decode", 16, 128, 16, 32, 4, 2, "168 registers; 64 keys spill 48 bytes", min_blocks=4, gaps=True),
    Row("flashcore_decode", 16, 256, 16, 32, 4, 1, "202 registers, 25 KiB", min_blocks=4, gaps=True),
    Row("flashcore_decode", 32, 64, 16, 32, 4, 1, "138 registers; 2 stages spill 16 bytes", min_blocks=4, gaps=True),
    Row("flashcore_decode", 32, 128, 16, 32, 4, 1, "142 registers, 26 KiB", min_blocks=4, gaps=True),
    Row("flashcore_decode", 32, 256, 16, 16, 4, 1, "146 registers, 33 KiB", min_blocks=8, gaps=True),
)

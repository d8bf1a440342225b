"""Configurations for compute capability 9.0 (H100, H200: 227 KiB of shared memory a block, wgmma).

The reasons are what ptxas reports for the kernel with every feature that a row serves: registers of a thread (255 are
all there are), and bytes of shared memory or of spilled registers. Triton 3.9; 3.6 agrees unless it is named. Spills
outside of the loops do not count; within them they cost double here: ptxas then waits for each wgmma by itself. TFLOP/s
are of an H200, B8 S2048 in bf16, causal and full, Triton 3.6; what names none has not been timed.
"""

from .row import Row

ROWS = (
    Row("flashcore_forward", 16, 64, 64, 64, 4, 3, "339, 376 TFLOP/s; 128x64 316, 374", whole=True, ranges=False),
    Row("flashcore_forward", 16, 64, 128, 64, 4, 3, "with a range 14 % before 64x64, of 222 registers", whole=True),
    Row("flashcore_forward", 16, 128, 64, 64, 4, 3, "382, 428 TFLOP/s; 128x64 and 8 warps 347, 409", whole=True),
    Row("flashcore_forward", 16, 192, 128, 64, 8, 3, "192/128 383, 450 TFLOP/s; 64x64 364, 417", whole=True),
    Row("flashcore_forward", 16, 128, 128, 64, 8, 3, "255 registers at 40; 64x64 spills 416 bytes there, 512 at 72"),
    Row("flashcore_forward", 16, 256, 128, 64, 8, 2, "371, 458 TFLOP/s; a third less with 32 keys a block"),
    Row("flashcore_forward", 8, 64, 128, 64, 4, 3, "15 % before 64x64 at S2048", whole=True),
    Row("flashcore_forward", 8, 128, 64, 64, 4, 3, "6 % before 128x64 with 8 warps at S2048", whole=True),
    Row("flashcore_forward", 8, 128, 128, 64, 8, 3, "as for 16 bits"),
    Row("flashcore_forward", 8, 256, 128, 32, 8, 2, "128x64 spills 376 bytes: 7 % faster at S2048, 2 % slower at S512"),
    Row("flashcore_forward", 32, 64, 64, 32, 8, 2, "142 registers, 40 KiB; 64x64 takes 255"),
    Row("flashcore_forward", 32, 128, 64, 16, 8, 2, "184 registers, 52 KiB; 64x32 spills 120 bytes on Triton 3.6"),
    Row("flashcore_forward", 32, 256, 32, 16, 8, 2, "187 registers, 66 KiB; 32x32 spills 40 bytes on Triton 3.6"),
    Row("flashcore_forward", 16, 64, 64, 32, 8, 1, "202 registers; 2 stages serialise wgmma", gaps=True),
    Row("flashcore_forward", 16, 128, 64, 32, 8, 1, "228 registers; 2 stages serialise wgmma, 64x64 spills", gaps=True),
    Row("flashcore_forward", 16, 256, 32, 32, 8, 2, "146 registers, by mma.sync; 64x32 spills 72 bytes", gaps=True),
    Row("flashcore_forward", 32, 64, 32, 32, 8, 2, "184 registers, 32 KiB; 64x32 spills 160 bytes", gaps=True),
    Row("flashcore_forward", 32, 128, 32, 32, 8, 2, "168 registers, 56 KiB; 64x16 spills 16 bytes", gaps=True),
    Row("flashcore_forward", 32, 256, 32, 16, 8, 2, "182 registers; 32x32 spills 24 bytes on Triton 3.6", gaps=True),
    Row("flashcore_decode", 16, 64, 32, 64, 4, 3, "128 registers, 40 KiB (152 on Triton 3.6); 64 rows serialise wgmma"),
    Row("flashcore_decode", 16, 128, 32, 64, 4, 3, "196 registers, 44 KiB; 64 rows take 244 and 80 KiB"),
    Row("flashcore_decode", 16, 256, 16, 32, 4, 2, "152 registers, 41 KiB: three blocks an SM"),
    Row("flashcore_decode", 32, 64, 16, 64, 4, 2, "87 registers, 40 KiB: five blocks an SM"),
    Row("flashcore_decode", 32, 128, 16, 32, 4, 2, "145 registers, 42 KiB: three blocks an SM"),
    Row("flashcore_decode", 32, 256, 16, 16, 8, 2, "158 registers, 50 KiB; 16x32 and 4 warps spill 64 on Triton 3.6"),
    Row("flashcore_decode", 16, 64, 32, 32, 4, 3, "240 registers; 64 keys spill at D 16", gaps=True),
    Row("flashcore_decode", 16, 128, 16, 32, 4, 2, "151 registers; 64 keys spill 48 bytes", gaps=True),
    Row("flashcore_decode", 16, 256, 16, 32, 4, 2, "200 registers, 42 KiB", gaps=True),
    Row("flashcore_decode", 32, 64, 16, 64, 4, 2, "158 registers, 44 KiB; 1 stage spills 144 bytes", gaps=True),
    Row("flashcore_decode", 32, 128, 16, 32, 4, 2, "159 registers, 44 KiB: 3 blocks an SM", gaps=True),
    Row("flashcore_decode", 32, 256, 16, 16, 8, 2, "149 registers, 50 KiB; 4 warps take 191", gaps=True),
)

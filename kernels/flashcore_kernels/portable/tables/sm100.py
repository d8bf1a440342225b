"""Configurations for compute capability 10.0 (B200: 227 KiB of shared memory a block, tcgen05).

Those of 9.0, compiled for 10.0 and free of spills there too, but for the rows below. None has been timed.
"""

from .row import Row
from .sm90 import ROWS as SM90

_OWN = (
    Row("flashcore_forward", 16, 64, 128, 32, 8, 3, "154 registers, 41 KiB; 128x64 spills 32 bytes at head_dim 40"),
    Row("flashcore_forward", 16, 128, 128, 32, 8, 3, "174 registers, 81 KiB; 128x64 spills 24 bytes"),
    Row("flashcore_forward", 16, 256, 64, 32, 8, 2, "182 registers, 97 KiB; 128x32 spills 24 bytes"),
    Row("flashcore_forward", 8, 128, 64, 64, 4, 3, "254 registers, 40 KiB; 128x64 spills 80 bytes", whole=True),
    Row("flashcore_forward", 8, 128, 128, 64, 8, 3, "as for 9.0, never timed"),
    Row("flashcore_forward", 8, 256, 64, 64, 8, 2, "220 registers, 128 KiB; 128x32 spills 16 bytes in its loops"),
)

ROWS = _OWN + tuple(row for row in SM90 if row.gaps or row[:2] not in {own[:2] for own in _OWN})

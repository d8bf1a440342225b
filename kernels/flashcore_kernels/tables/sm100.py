"""Configurations for compute capability 10.0 (B200: 227 KiB of shared memory a block, tcgen05).

Those of 9.0, compiled for 10.0 and free of spills there too, but for the row below. None has been timed.
"""

from .row import Row
from .sm90 import ROWS as SM90

_TWO_STAGES = Row(
    "flashcore_forward", 16, 128, 128, 64, 8, 2, "253 registers, 97 KiB; 3 stages spill 24 bytes, on 3.6 two do 8"
)

ROWS = tuple(_TWO_STAGES if row[:3] == _TWO_STAGES[:3] and not row.gaps else row for row in SM90)

"""Configurations for compute capability 8.6, 8.9 and 12.0 (consumer and L4/L40: 99 KiB of shared memory a block).

The rows of 8.0 need less than that (72 KiB at most), and are held back by registers, of which these GPUs have as many.
"""

from .sm80 import ROWS as SM80

ROWS = SM80

"""Configurations for compute capability 8.6, 8.9 and 12.0 (RTX 30 to 50, L4, L40: 99 KiB of shared memory a block).

The rows of 8.0 need 80 KiB at most; registers hold them back, not shared memory, and of those these GPUs have as many.
"""

from .sm80 import ROWS as SM80

ROWS = SM80

"""Configurations for sm80."""

from .row import Row

ROWS = (
    Row("flashcore_forward", 16, 64, 128, 64, 4, 3, "seed"),
    Row("flashcore_forward", 16, 128, 128, 64, 8, 3, "seed"),
    Row("flashcore_forward", 16, 256, 64, 32, 4, 2, "seed"),
    Row("flashcore_forward", 32, 64, 64, 32, 4, 2, "seed"),
    Row("flashcore_forward", 32, 128, 32, 32, 4, 2, "seed"),
    Row("flashcore_forward", 32, 256, 32, 16, 8, 1, "seed"),
    Row("flashcore_decode", 16, 64, 64, 128, 4, 3, "seed"),
    Row("flashcore_decode", 16, 128, 64, 64, 4, 3, "seed"),
    Row("flashcore_decode", 16, 256, 64, 32, 4, 2, "seed"),
    Row("flashcore_decode", 32, 64, 32, 32, 4, 2, "seed"),
    Row("flashcore_decode", 32, 128, 32, 32, 4, 2, "seed"),
    Row("flashcore_decode", 32, 256, 16, 16, 4, 1, "seed"),
)

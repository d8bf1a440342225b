"""Configurations of the Gluon kernel for compute capability 9.0.

The reasons are medians over B * S = 16K tokens in bf16, S = 512 to 8192, causal and full, on an H200 with Triton 3.6.
"""

from .row import HopperRow

ROWS = (
    HopperRow((64, 0), (64, 0), 2, 128, 2, False, False, 240, 24, "338 TFLOP/s; P rounded early 316, 3 consumers 313"),
    HopperRow((64, 32), (64, 32), 2, 128, 2, False, True, 240, 24, "as head_dim 128; others not timed"),
    HopperRow((128, 0), (128, 0), 2, 128, 2, False, True, 240, 24, "506 TFLOP/s, without turns 502"),
    HopperRow(
        (128, 64), (128, 0), 2, 128, 2, True, True, 240, 24, "as head_dim 128; the output has no room of its own"
    ),
    HopperRow((256, 0), (256, 0), 2, 64, 2, True, False, 240, 24, "514 TFLOP/s; P rounded early 495, then turns 473"),
)


def hopper_configuration(head_dim: int, value_dim: int) -> HopperRow | None:
    """The row for these head dimensions, or None where none fits."""
    for row in ROWS:
        if head_dim <= sum(row.head_dim) and value_dim <= sum(row.value_dim):
            return row
    return None

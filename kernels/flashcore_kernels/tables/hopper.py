"""Configurations of the Gluon kernel for compute capability 9.0."""

from .row import HopperRow

ROWS = (
    HopperRow((64, 0), (64, 0), 2, 128, 2, False, False, False, False, 240, 24, "the first that was right on a GPU"),
    HopperRow((64, 32), (64, 32), 2, 128, 2, False, False, False, False, 240, 24, "the first that was right on a GPU"),
    HopperRow((128, 0), (128, 0), 2, 128, 2, False, False, False, False, 240, 24, "the first that was right on a GPU"),
    HopperRow((256, 0), (256, 0), 2, 64, 2, True, False, False, False, 240, 24, "the first that was right on a GPU"),
)


def hopper_configuration(head_dim: int, value_dim: int) -> HopperRow | None:
    """The row for these head dimensions, or None where none fits."""
    for row in ROWS:
        if head_dim <= sum(row.head_dim) and value_dim <= sum(row.value_dim):
            return row
    return None

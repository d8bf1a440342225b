"""Configurations of `flashcore_hopper_paged`, prompts on pages in Gluon for compute capability 9.0."""

from typing import NamedTuple


class PagedRow(NamedTuple):
    """One configuration, for head dimensions up to `head_dim`. Two consumers, of 64 rows each.

    Attributes:
        head_dim: columns of the tiles of Q, K and V: whole rows of all of them.
        block_n: keys of a block: those of the prefill's rows for these head dimensions, or bits would differ.
        stages: blocks of K and V in shared memory. There are two tiles of Q.
        least_page: smallest pages that it serves.
        consumer_registers, producer_registers: of a thread.
        short_masks: as in `prefill.table.PrefillRow`, and so are `scores_ahead`, which all rows have, and two buffers
            of queries.
        why: what speaks for it.
    """

    head_dim: int
    block_n: int
    stages: int
    least_page: int
    consumer_registers: int
    producer_registers: int
    short_masks: bool
    why: str


ROWS = (
    PagedRow(
        head_dim=64, block_n=128, stages=3, least_page=128, consumer_registers=240, producer_registers=24,
        short_masks=True, why="as the prefill's row for calls of any kind",
    ),
    PagedRow(
        head_dim=64, block_n=128, stages=3, least_page=16, consumer_registers=232, producer_registers=40,
        short_masks=True, why="the producer has up to eight pages in registers",
    ),
    PagedRow(
        head_dim=128, block_n=128, stages=2, least_page=128, consumer_registers=240, producer_registers=24,
        short_masks=True, why="as the prefill's row for key ranges: of short prompts every block is at an edge",
    ),
    PagedRow(
        head_dim=128, block_n=128, stages=2, least_page=16, consumer_registers=232, producer_registers=40,
        short_masks=True, why="as for head_dim 64",
    ),
)  # fmt: skip


def paged_row_for(head_dim: int, page_size: int) -> PagedRow | None:
    """The row for the larger of the head dimensions and pages of this size, or None where none fits."""
    for row in ROWS:
        if head_dim <= row.head_dim and page_size >= row.least_page:
            return row
    return None

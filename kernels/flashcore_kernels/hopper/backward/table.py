"""How the backward's kernels are cut on compute capability 9.0.

The reasons are TFLOP/s of 10 operations a pair and column of a head, in bf16, over B * S = 16K tokens at S = 2048 and
8192 causal, 2048 and 8192 full, on an H200 with Triton 3.6, and instructions that ptxas spills in the main loops.

What bounds both kernels in long sequences is not their order of work. At head_dim 128 the tensor cores are busy 87 to
90 % of the time. At 64 they are 69 %, but there these gave the same times within 3 %: the next scores issued ahead,
consumers that take turns, halves of a block whose products run beside the other half's exponentials. A launch alone
takes 2.5 ms at 1.79 GHz where launches back to back take 2.8: power is the limit, and so the number of products.
"""

from typing import NamedTuple


class DqRow(NamedTuple):
    """How `dq` works: keys of a block, blocks of K and V in shared memory, registers of a thread."""

    block_n: int
    stages: int
    consumer_registers: int = 240
    producer_registers: int = 24


class DkdvRow(NamedTuple):
    """How `dkdv` works: queries of a block, blocks of Q and of dO in shared memory, registers of a thread.

    With `shared_keys` both consumers have the same 64 keys: one makes dV, the other dK, of which neither has registers
    for both.
    """

    block_m: int
    query_stages: int
    grad_stages: int
    shared_keys: bool = False
    consumer_registers: int = 240
    producer_registers: int = 24


class BackwardRow(NamedTuple):
    """One configuration, for head dimensions up to `head_dim` and `value_dim`.

    Attributes:
        head_dim, value_dim: columns of the tiles, powers of two.
        softcap: it serves calls with softcap, and only those.
        dq, dkdv: of the two kernels.
        why: what speaks for it.

    Rows of the same head dimensions have one `block_n` and one `block_m`, or a sequence's bits would differ.
    """

    head_dim: int
    value_dim: int
    softcap: bool
    dq: DqRow
    dkdv: DkdvRow
    why: str


ROWS = (
    BackwardRow(
        head_dim=64, value_dim=64, softcap=False,
        dq=DqRow(block_n=128, stages=3),
        dkdv=DkdvRow(block_m=128, query_stages=2, grad_stages=2),
        why="354, 402, 391, 417; blocks of 64 keys and 64 queries 322, 385, 378, 373",
    ),
    BackwardRow(
        head_dim=128, value_dim=128, softcap=False,
        dq=DqRow(block_n=64, stages=3),
        dkdv=DkdvRow(block_m=64, query_stages=3, grad_stages=3),
        why="461, 465, 472, 497; dq with 128 keys 432, 464, 467, 498, and with a key range 27 spills; dkdv in 2 stages "
        "410, 458, 468, 457",
    ),
    BackwardRow(
        head_dim=64, value_dim=64, softcap=True,
        dq=DqRow(block_n=64, stages=3),
        dkdv=DkdvRow(block_m=64, query_stages=2, grad_stages=2),
        why="tanh needs registers: blocks of 128 keys or queries spill 60",
    ),
    BackwardRow(
        head_dim=128, value_dim=128, softcap=True,
        dq=DqRow(block_n=64, stages=3),
        dkdv=DkdvRow(block_m=32, query_stages=4, grad_stages=4),
        why="blocks of 64 queries spill 40",
    ),
    *(
        BackwardRow(
            head_dim=256, value_dim=128, softcap=softcap,
            dq=DqRow(block_n=32, stages=4),
            dkdv=DkdvRow(block_m=64, query_stages=3, grad_stages=3, shared_keys=True),
            why="never timed; it serves 192 with 128, of whose products a quarter of the columns is zeros",
        )
        for softcap in (False, True)
    ),
    *(
        BackwardRow(
            head_dim=256, value_dim=256, softcap=softcap,
            dq=DqRow(block_n=32, stages=3),
            dkdv=DkdvRow(block_m=64, query_stages=2, grad_stages=2, shared_keys=True),
            why="2 x 8192 causal, 16 heads, 430 TFLOP/s; in dq blocks of 64 keys spill 85",
        )
        for softcap in (False, True)
    ),
)  # fmt: skip


def backward_row_for(head_dim: int, value_dim: int, *, softcap: bool) -> BackwardRow | None:
    """The row for these head dimensions, or None where none fits."""
    for row in ROWS:
        if head_dim <= row.head_dim and value_dim <= row.value_dim and row.softcap == softcap:
            return row
    return None

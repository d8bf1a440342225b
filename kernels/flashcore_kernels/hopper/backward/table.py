"""What the Hopper backward supports, and its configurations for compute capability 9.0. Imports no Triton.

Supported: float16 and bfloat16; head_dim and value_dim up to 128, multiples of 8 whose rows begin at multiples of 16
bytes; any ratio of heads; causal, windows to both sides, any offset of the queries; a KeyRange of a line a sequence,
holes too; softcap; sinks and their gradient; gradients through lse. What no query sees may be NaN.
Not supported, so that the portable backward serves it: a KeyRange of a line a query, dense masks and biases, larger
heads, fp32, a scale that is not positive.

The reasons are TFLOP/s of 10 operations a pair and column of a head, in bf16, over B * S = 16K tokens at S = 2048 and
8192 causal, 2048 and 8192 full, on an H200 with Triton 3.6, and instructions that ptxas spills in the main loops.
"""

from typing import NamedTuple

import torch

from ...problem import Problem

# The first Triton whose Gluon has wgmma.
FIRST_TRITON = (3, 5)


class DqRow(NamedTuple):
    """How `dq` works: keys of a block, blocks of K and V in shared memory, registers of a thread."""

    block_n: int
    stages: int
    consumer_registers: int = 240
    producer_registers: int = 24


class DkdvRow(NamedTuple):
    """How `dkdv` works: queries of a block, blocks of Q and of dO in shared memory, registers of a thread."""

    block_m: int
    query_stages: int
    grad_stages: int
    consumer_registers: int = 240
    producer_registers: int = 24


class BackwardRow(NamedTuple):
    """One configuration, for head dimensions up to `head_dim` and `value_dim`.

    Attributes:
        head_dim, value_dim: columns of the tiles, powers of two.
        softcap: it serves calls with softcap, and only those.
        dq, dkdv: of the two kernels.
        why: what speaks for it.
        num_warps, num_stages: of the launches; the warps are those of one consumer.

    Rows of the same head dimensions have one `block_n` and one `block_m`, or a sequence's bits would differ.
    """

    head_dim: int
    value_dim: int
    softcap: bool
    dq: DqRow
    dkdv: DkdvRow
    why: str
    num_warps: int = 4
    num_stages: int = 1


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
)  # fmt: skip


def backward_configuration(problem: Problem) -> BackwardRow | None:
    """The row for this problem, or None where none fits."""
    for row in ROWS:
        fits = problem.head_dim <= row.head_dim and problem.value_dim <= row.value_dim
        if fits and row.softcap == (problem.softcap > 0.0):
            return row
    return None


def hopper_backward_reason(problem: Problem, arch: int, triton: tuple[int, int]) -> str | None:
    """Why the Hopper backward cannot serve this problem, or None where it can.

    Args:
        arch: compute capability as major * 10 + minor.
        triton: its version.
    """
    if arch != 90:
        return f"it is for compute capability 9.0, this GPU has {arch // 10}.{arch % 10}"
    if triton < FIRST_TRITON:
        return f"it needs Triton {'.'.join(map(str, FIRST_TRITON))} or newer"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {problem.dtype}"
    if problem.mask_kind is not None:
        return "there is a dense mask"
    if problem.range_layout == "rows":
        return "there is a key range for each query"
    if problem.head_dim % 8 or problem.value_dim % 8 or not problem.aligned:
        return "rows do not all start at multiples of 16 bytes"
    if not problem.scale > 0.0:
        return "the scale is not positive"
    if backward_configuration(problem) is None:
        return f"head_dim {problem.head_dim} and value_dim {problem.value_dim} are larger than its tiles"
    return None

"""Which prefills the Gluon kernels serve on compute capability 9.0, and with which tiles."""

from typing import NamedTuple

import torch

from ...device import Device
from ...plan import Plan, is_decode, why_not_decode
from ...problem import Problem
from .. import FIRST_TRITON
from .table import PrefillRow, ShortRow, prefill_row_for, short_row_for

# The first Triton that puts barriers where both consumers of a partition would wait for each other.
ONE_COPY_BEFORE = (3, 8)


class PrefillConfig(NamedTuple):
    """How `flashcore_hopper` runs.

    Attributes:
        row: of the table.
        processors: streaming multiprocessors of the GPU.
    """

    row: PrefillRow
    processors: int

    @property
    def block_m(self) -> int:
        """Queries of a tile."""
        return 64 * self.row.consumers

    @property
    def block_n(self) -> int:
        """Keys of a block."""
        return self.row.block_n

    @property
    def num_warps(self) -> int:
        """Of the launch: those of the first partition."""
        return 8 if self.row.one_copy else 4

    @property
    def num_stages(self) -> int:
        """Blocks of K and V in shared memory."""
        return self.row.stages


class ShortConfig(NamedTuple):
    """How `flashcore_hopper_short` runs.

    Attributes:
        row: of the table.
    """

    row: ShortRow

    block_m = 64
    num_warps = 4

    @property
    def block_n(self) -> int:
        """Keys of a block."""
        return self.row.block_n

    @property
    def num_stages(self) -> int:
        """Blocks of K and V in shared memory."""
        return self.row.stages


def choose_hopper_prefill(problem: Problem, device: Device) -> Plan | str | None:
    """`flashcore_hopper` or, of short sequences, `flashcore_hopper_short`, which gives the same bits.

    Or why neither can serve this prefill; None: it is a decode, or another GPU.
    """
    if device.arch != 90 or is_decode(problem) and not problem.fp8:
        return None
    row = prefill_row_for(
        problem.head_dim, problem.value_dim, problem.num_queries, causal=problem.right >= 0,
        plain=problem.range_layout is None and not problem.softcap and problem.mask_kind is None
        and not problem.dropout,
        one_copy=device.triton < ONE_COPY_BEFORE, masked=problem.mask_kind is not None, bias_bits=_bias_bits(problem),
    )  # fmt: skip
    reason = _reason_against(problem, device, row)
    if reason is not None:
        return reason
    short = None
    if _sees_all(problem):
        sizes = problem.head_dim, problem.value_dim, problem.num_keys
        short = short_row_for(*sizes, dropout=problem.dropout > 0.0)
    if short is not None:
        why = f"{why_not_decode(problem)}, and {problem.num_keys} keys, at most {short.most_keys}"
        return Plan("flashcore_hopper_short", why, ShortConfig(short))
    return Plan("flashcore_hopper", why_not_decode(problem), PrefillConfig(row, device.processors))


def _sees_all(problem: Problem) -> bool:
    """Whether queries see all keys, or those of a KeyRange with a line a sequence, without softcap and sinks.

    With a KeyRange there are as many key slots as queries: sequences attend to themselves. Elsewhere the keys are most
    likely a cache's, and the kernel that `precompile` has begun to compile for its prompt is to serve that.
    """
    if problem.softcap or problem.has_sinks or problem.mask_kind is not None:
        return False
    if problem.range_layout == "sequence":
        return problem.num_queries == problem.num_keys
    return problem.range_layout is None and problem.left < 0 and problem.right < 0


def _bias_bits(problem: Problem) -> int:
    """Of an element of a bias that tiles of 64 queries have to be fetched of, 0 where there is none."""
    # What is longer is copied into fp32.
    return min(problem.mask_bits, 32) if problem.mask_kind == "float" and problem.mask_rows else 0


def _reason_against(problem: Problem, device: Device, row: PrefillRow | None) -> str | None:
    if device.triton < FIRST_TRITON:
        return f"that needs Triton 3.5 or newer, and this is {device.triton[0]}.{device.triton[1]}"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"that takes float16 and bfloat16, not {problem.dtype}"
    if problem.fp8:
        return "key and value are in fp8"
    if problem.dropout and problem.mask_kind is not None:
        return "weights are dropped beside a dense mask"
    if not problem.aligned:
        return "an address or stride of query, key or value is no multiple of 16 bytes"
    if problem.value_dim % 8:
        return f"rows of {problem.value_dim} values are no multiple of 16 bytes"
    if row is None and _bias_bits(problem):
        return (
            f"no configuration has head_dim {problem.head_dim} with {problem.value_dim} and room for a bias of "
            f"{_bias_bits(problem)} bits"
        )
    if row is None:
        return f"no configuration has head_dim {problem.head_dim} with {problem.value_dim}"
    return None

"""Which decodes the Gluon kernel serves on compute capability 9.0, and with which tiles."""

from typing import NamedTuple

import torch

from ...device import Device
from ...plan import Plan, is_decode, power_of_2_from, why_decode
from ...problem import Problem
from .. import FIRST_TRITON
from .table import ROWS, DecodeRow, decode_row_for


class HopperDecodeConfig(NamedTuple):
    """How `flashcore_hopper_decode` runs.

    Attributes:
        row: of the table.
        block_m: rows of a tile (query tokens x group).
        block_d, block_dv: head_dim and value_dim padded to powers of two.
        max_chunks: most chunks of a sequence, a power of two.
        processors: streaming multiprocessors of the GPU.
    """

    row: DecodeRow
    block_m: int
    block_d: int
    block_dv: int
    max_chunks: int
    processors: int

    @property
    def block_n(self) -> int:
        """Keys of a block."""
        return self.row.block_n

    @property
    def min_chunk(self) -> int:
        """Least keys of a chunk."""
        return self.row.min_chunk

    @property
    def num_warps(self) -> int:
        """Of the launch."""
        return 4

    @property
    def num_stages(self) -> int:
        """Of the launch. Triton makes nothing of it: the kernel's stages are in its constants."""
        return self.row.stages[0][0]


def choose_hopper_decode(problem: Problem, device: Device) -> Plan | str | None:
    """`flashcore_hopper_decode`, or why it cannot serve this decode; None: it is no decode, or another GPU."""
    if not is_decode(problem) or device.arch != 90:
        return None
    reason = _reason_against(problem, device)
    if reason is not None:
        return reason
    row = decode_row_for(8 if problem.fp8 else 16, max(problem.head_dim, problem.value_dim))
    config = HopperDecodeConfig(
        row=row,
        # wgmma's least are 8 rows, and 64 columns of the output.
        block_m=min(max(power_of_2_from(problem.num_queries * problem.group), 8), row.rows),
        # 32 bytes of a row, so that all threads copy no more than 64 keys at once.
        block_d=max(power_of_2_from(problem.head_dim), 32 if problem.fp8 else 16),
        block_dv=max(power_of_2_from(problem.value_dim), 64),
        max_chunks=power_of_2_from(-(-row.chunks // problem.num_kv_heads)),
        processors=device.processors,
    )
    return Plan("flashcore_hopper_decode", why_decode(problem), config)


def _reason_against(problem: Problem, device: Device) -> str | None:
    if device.triton < FIRST_TRITON:
        return f"that needs Triton 3.5 or newer, and this is {device.triton[0]}.{device.triton[1]}"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"that takes float16 and bfloat16, not {problem.dtype}"
    if problem.mask_kind is not None:
        return "there is a dense mask"
    if problem.dropout:
        return "weights are dropped"
    if not problem.aligned:
        return "an address or stride of query, key or value is no multiple of 16 bytes"
    if max(problem.head_dim, problem.value_dim) > max(row.head_dim for row in ROWS):
        return f"no configuration has head_dim {problem.head_dim} with {problem.value_dim}"
    elements = 16 if problem.fp8 else 8  # of 16 bytes
    if problem.head_dim % elements or problem.value_dim % elements:
        return f"rows of {problem.head_dim} or {problem.value_dim} elements are no multiple of 16 bytes"
    return None

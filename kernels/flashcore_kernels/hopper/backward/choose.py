"""Which backwards the Gluon kernels can serve on compute capability 9.0, and with which tiles.

Supported: float16 and bfloat16; head_dim and value_dim up to 256, multiples of 8; any ratio of heads; causal, windows
to both sides, any offset of the queries; a KeyRange of either layout, holes too; softcap; sinks and their gradient;
gradients through lse; dropout. Keys and values that no query sees may be NaN, and so may queries that see no key, and
their dO.
"""

from typing import NamedTuple

import torch

from ...device import Device
from ...plan import Plan
from ...problem import Problem
from .. import FIRST_TRITON
from .table import BackwardRow, backward_row_for


class HopperBackwardConfig(NamedTuple):
    """How the three kernels run.

    Attributes:
        row: of the table.
        processors: streaming multiprocessors of the GPU.
    """

    row: BackwardRow
    processors: int


def choose_hopper_backward(problem: Problem, device: Device) -> Plan | str | None:
    """`flashcore_hopper_backward`, or why it cannot serve this call; None: another GPU."""
    if device.arch != 90:
        return None
    reason = _reason_against(problem, device)
    if reason is not None:
        return reason
    row = backward_row_for(problem.head_dim, problem.value_dim, softcap=problem.softcap > 0.0)
    config = HopperBackwardConfig(row=row, processors=device.processors)
    return Plan("flashcore_hopper_backward", "gradients are asked for", config)


def _reason_against(problem: Problem, device: Device) -> str | None:
    if device.triton < FIRST_TRITON:
        return f"that needs Triton 3.5 or newer, and this is {device.triton[0]}.{device.triton[1]}"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"that takes float16 and bfloat16, not {problem.dtype}"
    if problem.fp8:
        return "key and value are in fp8"
    if problem.mask_kind is not None:
        return "there is a dense mask"
    if problem.head_dim % 8 or problem.value_dim % 8:
        return f"rows of {problem.head_dim} or {problem.value_dim} numbers are no multiple of 16 bytes"
    if not problem.scale > 0.0:
        return "the scale is not positive"
    if backward_row_for(problem.head_dim, problem.value_dim, softcap=problem.softcap > 0.0) is None:
        return f"no configuration has head_dim {problem.head_dim} with {problem.value_dim}"
    return None

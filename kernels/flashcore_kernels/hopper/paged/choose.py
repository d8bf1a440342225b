"""Which prompts and single tokens on pages the Gluon kernels serve on compute capability 9.0, and with which tiles."""

from typing import NamedTuple

import torch

from ...device import Device
from ...paged_problem import PagedProblem
from ...plan import Plan
from .. import FIRST_TRITON
from ..decode.choose import HopperDecodeConfig, choose_hopper_decode
from .table import PagedRow, paged_row_for


class PromptConfig(NamedTuple):
    """How `flashcore_hopper_paged` runs.

    Attributes:
        row: of the table.
        pack: query heads of one KV head that lie in a tile beside each other.
        processors: streaming multiprocessors of the GPU.
    """

    row: PagedRow
    pack: int
    processors: int

    @property
    def tokens(self) -> int:
        """Query tokens of a tile."""
        return 128 // self.pack


def choose_hopper_prompts(problem: PagedProblem, device: Device, aligned: bool) -> PromptConfig | str | None:
    """The configuration for a call's prompts, or why the kernel cannot serve them; None: another GPU.

    Args:
        aligned: addresses and strides of query and pages are multiples of 16 bytes.
    """
    if device.arch != 90 or device.kind != "cuda":
        return None
    row = paged_row_for(max(problem.head_dim, problem.value_dim), problem.page_size)
    reason = _reason_against(problem, device, row, aligned)
    if reason is not None:
        return reason
    # The largest power of two in the group, so that a tile's rows are whole tokens of a unit.
    return PromptConfig(row, min(problem.group & -problem.group, 64), device.processors)


def choose_hopper_single(problem: PagedProblem, device: Device, aligned: bool) -> HopperDecodeConfig | str | None:
    """The configuration for a call's single tokens, that of the decode without pages; otherwise as above.

    It does not depend on what else is in a batch, so that a token's bits do not.

    Args:
        aligned: addresses and strides of query, pages and new keys are multiples of 16 bytes.
    """
    if device.kind != "cuda":
        return None
    if problem.fp8 and (problem.ring or problem.new_keys):
        return "pages in fp8 are a ring, or new keys, which are not in fp8, lie beside them"
    chosen = choose_hopper_decode(problem.single._replace(aligned=aligned), device)
    return chosen.config if isinstance(chosen, Plan) else chosen


def _reason_against(problem: PagedProblem, device: Device, row: PagedRow | None, aligned: bool) -> str | None:
    if device.triton < FIRST_TRITON:
        return f"that needs Triton 3.5 or newer, and this is {device.triton[0]}.{device.triton[1]}"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"that takes float16 and bfloat16, not {problem.dtype}"
    if problem.fp8:
        return "the pages are in fp8"
    if problem.new_keys or problem.ring:
        return "keys lie in a ring, or beside the pages"
    if not aligned:
        return "an address or stride of query or pages is no multiple of 16 bytes"
    if problem.value_dim % 8:
        return f"rows of {problem.value_dim} values are no multiple of 16 bytes"
    if row is None:
        return f"no configuration has head_dim {problem.head_dim} with pages of {problem.page_size}"
    return None

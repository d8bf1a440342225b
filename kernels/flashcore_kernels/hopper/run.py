"""From a Problem to a launch of `flashcore_hopper`: tensor descriptors, grid, constants."""

import functools
from typing import NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..counters import forget, zero
from ..launch import launch, score_factors
from ..plan import Plan
from ..problem import Problem
from .kernel import Config, flashcore_hopper
from .schedule import heads_in_section

_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@functools.cache
def tile_layout(rows: int, columns: int, dtype: torch.dtype):
    """How a [rows, columns] tile lies in shared memory: swizzled as the copy engine and wgmma agree on."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], _DTYPES[dtype])


def _descriptor(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor | None:
    """What the copy engine needs to fetch tiles `[1, 1, rows, columns]` of a `[B, H, S, D]` tensor."""
    if not columns:
        return None
    # Where there is but one index its stride is never used and may be anything; the engine wants multiples of 16 bytes.
    strides = [stride if size > 1 else 8 for size, stride in zip(tensor.shape[:3], tensor.stride()[:3])]
    return TensorDescriptor(
        tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, columns], tile_layout(rows, columns, tensor.dtype)
    )


def make_config(problem: Problem, plan: Plan, lse: bool) -> Config:
    """What the kernel for this call is compiled for."""
    row = plan.hopper
    return Config(
        *row.head_dim, *row.value_dim, row.block_n, row.consumers, row.stages,
        (None, "sequence", "rows").index(problem.range_layout), problem.softcap > 0.0, problem.has_sinks, lse,
        row.query_slots, row.ahead, row.short_masks, row.consumer_registers, row.producer_registers,
        row.one_copy, row.turns,
    )  # fmt: skip


class HopperLaunch(NamedTuple):
    """Everything about a launch of `flashcore_hopper` but lse, key range, sinks, output and counter.

    Attributes:
        programs: size of the grid.
        descriptors: of the first and the second piece of query's, key's, value's and output's rows.
        writes_itself: the kernel takes the output's address, and no descriptors of it.
        scalars, constants: the parameters behind the pointers, see `launch`.
    """

    programs: int
    descriptors: tuple[TensorDescriptor | None, ...]
    writes_itself: bool
    scalars: tuple
    constants: tuple


def hopper_launch(
    problem: Problem,
    plan: Plan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_range: torch.Tensor | None,
    out: torch.Tensor,
    has_lse: bool,
) -> HopperLaunch:
    """Grid, descriptors and parameters for these tensors."""
    row = plan.hopper
    d0, d1 = row.head_dim
    dv0, dv1 = row.value_dim
    rows = 128 if row.one_copy else 64
    all_heads = problem.batch_size * problem.num_heads
    tiles_per_head = -(-problem.num_queries // plan.block_m)
    bytes_per_key = 2 * (problem.head_dim + problem.value_dim)
    section = 1
    if problem.right >= 0 or key_range is not None:  # tiles may differ in length
        section = heads_in_section(
            problem.num_keys, bytes_per_key, all_heads, problem.group, tiles_per_head, plan.processors, row.least_rounds
        )
    output = (None, None)
    if not row.one_copy:
        output = (_descriptor(out, 64, dv0 if row.query_slots == 2 else dv0 // 2), _descriptor(out, 64, dv1))
    range_strides = (0, 0) if key_range is None else (key_range.stride(0), key_range.stride(2))
    return HopperLaunch(
        min(plan.processors, all_heads * tiles_per_head),
        (
            _descriptor(query, rows, d0), _descriptor(query, rows, d1),
            _descriptor(key, plan.block_n, d0), _descriptor(key, plan.block_n, d1),
            _descriptor(value, plan.block_n, dv0), _descriptor(value, plan.block_n, dv1),
            *output,
        ),
        row.one_copy,
        (
            problem.num_heads, problem.group, problem.num_queries, problem.num_keys, problem.query_start,
            problem.left, problem.right, *range_strides, *(stride // 8 for stride in out.stride()[:3]),
            problem.value_dim // 8, *score_factors(problem)[:2], all_heads, tiles_per_head, section,
        ),
        (make_config(problem, plan, has_lse),),
    )  # fmt: skip


def without_base(descriptor: TensorDescriptor | None) -> dict | None:
    """What a descriptor says but for its tensor, which would otherwise be kept alive; see `on`."""
    return None if descriptor is None else {**descriptor.__dict__, "base": None}


def on(fields: dict | None, tensor: torch.Tensor) -> TensorDescriptor | None:
    """The descriptor that `without_base` took apart, on another tensor of the same shape, strides, dtype and alignment.

    It was validated when it was made, which costs more than all the rest of a launch. Always a new object: another
    thread may be launching with its own.
    """
    if fields is None:
        return None
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__ = {**fields, "base": tensor}
    return descriptor


def run_hopper(
    problem: Problem,
    plan: Plan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_range: torch.Tensor | None,
    mask: None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Launch `flashcore_hopper`: write `out` `[B, H, Q, Dv]` and, where given, `lse` `[B, H, Q]` fp32."""
    setup = hopper_launch(problem, plan, query, key, value, key_range, out, lse is not None)
    pointers = (
        *setup.descriptors, lse, key_range, sinks, out if setup.writes_itself else None, zero(query.device),
    )  # fmt: skip
    try:
        launch(flashcore_hopper, setup.programs, pointers, setup.scalars, setup.constants, plan)
    except BaseException:
        forget(query.device)
        raise

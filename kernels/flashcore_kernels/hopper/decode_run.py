"""From a Problem to a launch of `flashcore_hopper_decode`: grid, workspace, constants."""

import torch

from ..decode import DecodeLaunch, launch_decode, split_sizes
from ..launch import score_factors
from ..plan import Plan, padded
from ..problem import Problem
from .decode import DecodeConfig, flashcore_hopper_decode

UNIT = 16  # bytes, in which strides are counted


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of batch, head and sequence in units of 16 bytes; those that are never used may be anything."""
    elements = UNIT // tensor.element_size()
    return tuple(0 if size == 1 else stride // elements for size, stride in zip(tensor.shape[:3], tensor.stride()[:3]))


def _step(tensor: torch.Tensor) -> int:
    """Elements from a key to the next, for the layouts that caches have: heads outside or inside of the sequence."""
    _, heads, _, size = tensor.shape
    step = tensor.stride(2)
    return step if step in (size, heads * size) else 0


def make_decode_config(
    problem: Problem, plan: Plan, key_step: int, value_step: int, may_split: bool, lse: bool
) -> DecodeConfig:
    """What the kernel for this call is compiled for."""
    rows = padded(problem.num_queries * problem.group)
    return DecodeConfig(
        problem.head_dim, problem.value_dim, plan.block_d, plan.block_dv, key_step, value_step, problem.num_kv_heads,
        problem.group, plan.block_m, -(-problem.num_queries * problem.group // plan.block_m), plan.block_n,
        plan.num_stages, plan.min_chunk, plan.max_splits, may_split, min(rows, 512 // plan.block_dv),
        min(plan.max_splits, 16), problem.fp8, problem.range_layout is not None, problem.softcap > 0.0,
        problem.has_sinks, lse,
    )  # fmt: skip


def hopper_decode_launch(
    problem: Problem,
    plan: Plan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_range: torch.Tensor | None,
    has_lse: bool,
) -> DecodeLaunch:
    """Grid, workspace and parameters for tensors with these strides."""
    num_splits, units, partial = split_sizes(problem, plan)
    config = make_decode_config(problem, plan, _step(key), _step(value), num_splits > 1, has_lse)
    return DecodeLaunch(
        flashcore_hopper_decode,
        num_splits * units,
        units,
        partial,
        (*_strides(query), *_strides(key), *_strides(value), 0 if key_range is None else key_range.stride(0)),
        (
            problem.num_queries, problem.num_keys, problem.query_start, problem.left, problem.right, num_splits,
            *score_factors(problem)[:2],
        ),
        (config,),
    )  # fmt: skip


def run_hopper_decode(
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
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> None:
    """Launch `flashcore_hopper_decode`: write `out` `[B, H, Q, Dv]`, the heads inside the sequence in memory, and `lse`
    `[B, H, Q]` fp32 where given.
    """
    setup = hopper_decode_launch(problem, plan, query, key, value, key_range, lse is not None)
    launch_decode(setup, plan, (query, key, value, out, lse, key_range, sinks, key_scale, value_scale))

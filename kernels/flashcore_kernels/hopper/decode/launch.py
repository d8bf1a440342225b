"""From a Problem to a launch of `flashcore_hopper_decode`: grid, workspace, constants."""

import torch

from ...plan import most_chunks, power_of_2_from
from ...problem import Inputs, Problem
from ...runtime.launch import Launch
from .choose import HopperDecodeConfig
from .kernel import DecodeConstants, flashcore_hopper_decode
from .sharing import Sharing, row_tiles, share_out

ALIGNMENT = 16  # bytes, in which strides are counted
THREADS = 128  # of a program


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of batch, head and sequence in units of 16 bytes; those that are never used may be anything."""
    elements = ALIGNMENT // tensor.element_size()
    return tuple(0 if size == 1 else stride // elements for size, stride in zip(tensor.shape[:3], tensor.stride()[:3]))


def _step(tensor: torch.Tensor) -> int:
    """Elements from a key to the next, for the layouts that caches have: heads outside or inside of the sequence."""
    _, heads, _, size = tensor.shape
    step = tensor.stride(2)
    return step if step in (size, heads * size) else 0


def kernel_constants(
    problem: Problem,
    config: HopperDecodeConfig,
    sharing: Sharing,
    key_step: int,
    value_step: int,
    may_split: bool,
    has_lse: bool,
) -> DecodeConstants:
    """What the kernel for this call is compiled for."""
    rows = min(power_of_2_from(problem.num_queries * problem.group), config.block_m)
    values = 4096 if sharing.resident > 3 else 8192  # that there are registers for in a merge
    merge_rows = min(rows, values // (sharing.fan_in * config.block_dv))
    return DecodeConstants(
        head_dim=problem.head_dim,
        value_dim=problem.value_dim,
        block_d=config.block_d,
        block_dv=config.block_dv,
        key_step=key_step,
        value_step=value_step,
        num_kv_heads=problem.num_kv_heads,
        group=problem.group,
        rows=config.block_m,
        row_tiles=row_tiles(problem, config),
        block_n=config.block_n,
        stages=sharing.stages,
        resident=sharing.resident,
        min_chunk=config.min_chunk,
        max_splits=config.max_chunks,
        may_split=may_split,
        levels=sharing.levels,
        in_a_row=sharing.in_a_row,
        fan_in=sharing.fan_in,
        merge_rows=merge_rows,
        merge_groups=rows // merge_rows,
        fp8=problem.fp8,
        range=problem.range_layout is not None,
        softcap=problem.softcap > 0.0,
        sinks=problem.has_sinks,
        lse=has_lse,
    )


def compiler_options(constants: DecodeConstants) -> dict:
    """What the compiler is told beside the constants."""
    # Left alone ptxas takes what it likes. A few registers parked in memory cost less than one program less on each SM.
    registers = min(65536 // (THREADS * constants.resident) // 8 * 8, 255)
    return {"maxnreg": registers}


def make_launch(
    problem: Problem, config: HopperDecodeConfig, inputs: Inputs, output: torch.Tensor, has_lse: bool
) -> Launch:
    """The launch of `flashcore_hopper_decode` that writes output `[B, H, Q, Dv]`, the heads inside the sequence in
    memory, and, where wanted, lse `[B, H, Q]` fp32.
    """
    query, key, value, key_range = inputs[:4]
    chunks = most_chunks(problem.num_keys, config.min_chunk, config.max_chunks)
    sharing = share_out(problem, config)
    may_split = chunks > 1 and not sharing.whole_sequences
    constants = kernel_constants(problem, config, sharing, _step(key), _step(value), may_split, has_lse)
    heads = problem.batch_size * problem.num_kv_heads
    tiles = heads * constants.row_tiles
    each = sharing.chunks_each(chunks, tiles)
    num_splits = -(-chunks // each)
    row_nodes = tree_nodes(num_splits, constants.fan_in)
    mailboxes = heads * problem.num_queries * problem.group * row_nodes
    return Launch(
        kernel=flashcore_hopper_decode,
        grid=(num_splits, tiles) if sharing.in_a_row else (tiles, num_splits),
        operands=(
            "query", "key", "value", "output", "lse", "key_range", "sinks", "key_scale", "value_scale", "partials",
        ),
        integers=(
            *_strides(query), *_strides(key), *_strides(value), 0 if key_range is None else key_range.stride(0),
        ),
        scalars=(
            problem.num_queries, problem.num_keys, problem.query_start, problem.left, problem.right, num_splits,
            each, row_nodes, *problem.score_factors[:2],
        ),
        constants=(constants,),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        partials=mailboxes * (config.block_dv + 2) if may_split else 0,
        options=compiler_options(constants),
    )  # fmt: skip


def tree_nodes(leaves: int, fan_in: int) -> int:
    """Nodes on all levels of a tree whose nodes have up to `fan_in` children; one leaf is a tree."""
    nodes = level = leaves
    while level > 1:
        level = -(-level // fan_in)
        nodes += level
    return nodes

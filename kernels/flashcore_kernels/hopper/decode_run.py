"""From a Problem to a launch of `flashcore_hopper_decode`: grid, workspace, constants."""

from typing import NamedTuple

import torch

from ..decode import DecodeLaunch, launch_decode
from ..launch import score_factors
from ..plan import Plan, max_splits_for, padded
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


THREADS = 128  # of a program
# Fewer programs than this leave bandwidth unused, but where merging many rows costs more. Of e4m3 it takes twice
# as many.
ENOUGH = 256
# Programs that an SM has registers for, by rows.
MOST_RESIDENT = {8: 8, 16: 3, 32: 2}
# Values (rows x columns x levels) of trees that so many programs have registers for.
MOST_IN_TREES = {1: 8192, 2: 8192, 3: 4096, 4: 4096}


class Sharing(NamedTuple):
    """How the chunks of all sequences are shared out. None of it moves a bit of the answer.

    Attributes:
        stages: blocks of K and V in shared memory.
        levels: a program may take up to 2**levels chunks.
        fan_in: nodes of the tree that are merged at once.
        resident: programs that an SM runs at once.
        processors: SMs of the GPU.
        enough: programs that use all bandwidth.
        whole: a program takes all chunks of a sequence.
        in_a_row: the programs of a unit are numbered in a row.
    """

    stages: int
    levels: int
    fan_in: int
    resident: int
    processors: int
    enough: int
    whole: bool = False
    in_a_row: bool = False

    @property
    def slots(self) -> int:
        return self.resident * self.processors

    def chunks_each(self, chunks: int, units: int) -> int:
        """Chunks a program takes, where each of `units` tiles of rows may have `chunks`.

        The more, the fewer partial sums are written; but the programs shall fill the GPU, and all run at once or so
        many after each other that the last ones do not run alone for long.
        """
        if self.whole:
            return 2**self.levels
        for level in range(self.levels, 0, -1):
            programs = units * -(-chunks // 2**level)
            if self.enough <= programs <= self.slots or programs >= 1.9 * self.slots:
                return 2**level
        return 1


def sharing(problem: Problem, plan: Plan) -> Sharing:
    """From the batch and the heads alone: lengths grow in a generation, and each of these compiles a kernel."""
    row, processors = plan.hopper, plan.processors
    units = problem.batch_size * problem.num_kv_heads * _row_tiles(problem, plan)
    # A KeyRange may make one sequence longer than others, and then many programs shall share it.
    if problem.range_layout is None and units >= processors - 4 and plan.block_m <= 16:
        levels = (plan.max_splits - 1).bit_length()
        for stages, resident in row.whole:
            fit = plan.block_m * plan.block_dv * levels <= MOST_IN_TREES[resident]
            if units <= resident * processors and resident <= MOST_RESIDENT[plan.block_m] and fit:
                return Sharing(stages, levels, 4, resident, processors, units, whole=True)
    # Twice the rows take twice the registers for each level.
    levels = max(row.levels - (plan.block_m // 8).bit_length() + 1, 0)
    programs = units * plan.max_splits
    fits = [c for c in row.stages if (programs if c[1] == 1 else programs // 2**levels) <= c[1] * processors]
    stages, resident = (fits or row.stages[-1:])[0]
    if resident > 3 and problem.range_layout is not None and not problem.fp8:
        levels = min(levels, 2)  # with 3 registers spill: B64 S4096 250.5 us, with 2 247.8
    enough = max(ENOUGH * (16 if problem.fp8 else 8) // plan.block_m, processors - 4)
    if row.tall and resident > MOST_RESIDENT[plan.block_m] and units >= processors - 4:
        stages, resident, levels = row.tall
        # So few programs that all run at once would be too few where one sequence is longer than the others: 8 chunks
        # each instead of 4 take 37 us instead of 41 for B16 S2048, 4 tokens, but 24 instead of 14 if one alone is long.
        enough = resident * processors + 1
    shared = Sharing(stages, levels, 4, min(resident, MOST_RESIDENT[plan.block_m]), processors, enough)
    # What no call of this batch will use costs registers and instructions.
    if units * -(-plan.max_splits // 2) < min(enough, 1.9 * shared.slots):
        shared = shared._replace(levels=0)
    # As many as the longest sequences have, since instructions for more take time. Of many rows, or 16 of e4m3, they
    # take registers that so many programs do not have.
    nodes = -(-plan.max_splits // shared.chunks_each(plan.max_splits, units))
    most = 4 if plan.block_m > 8 else 8 if problem.fp8 else 16
    # The last program of a unit waits for the others. Where not all run at once it shall start long after them; where
    # each has an SM, those that start last shall not all be such: B1 S8192 of head_dim 64 8.04 us, in a row 7.86.
    return shared._replace(fan_in=min(max(padded(nodes), 4), most), in_a_row=units * nodes <= processors)


def _row_tiles(problem: Problem, plan: Plan) -> int:
    return -(-problem.num_queries * problem.group // plan.block_m)


def make_decode_config(
    problem: Problem, plan: Plan, shared: Sharing, key_step: int, value_step: int, may_split: bool, lse: bool
) -> DecodeConfig:
    """What the kernel for this call is compiled for."""
    rows = min(padded(problem.num_queries * problem.group), plan.block_m)
    values = 4096 if shared.resident > 3 else 8192  # that there are registers for in a merge
    merge_rows = min(rows, values // (shared.fan_in * plan.block_dv))
    return DecodeConfig(
        problem.head_dim, problem.value_dim, plan.block_d, plan.block_dv, key_step, value_step, problem.num_kv_heads,
        problem.group, plan.block_m, _row_tiles(problem, plan), plan.block_n, shared.stages, shared.resident,
        plan.min_chunk, plan.max_splits, may_split, shared.levels, shared.in_a_row, shared.fan_in,
        merge_rows, rows // merge_rows, problem.fp8, problem.range_layout is not None, problem.softcap > 0.0,
        problem.has_sinks, lse,
    )  # fmt: skip


def decode_options(config: DecodeConfig) -> dict:
    """What the compiler is told beside the configuration."""
    # Left alone ptxas takes what it likes. A few registers parked in memory cost less than one program less on each SM.
    registers = min(65536 // (THREADS * config.resident) // 8 * 8, 255)
    return {"maxnreg": registers}


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
    chunks = max_splits_for(problem.num_keys, plan)
    shared = sharing(problem, plan)
    may_split = chunks > 1 and not shared.whole
    config = make_decode_config(problem, plan, shared, _step(key), _step(value), may_split, has_lse)
    heads = problem.batch_size * problem.num_kv_heads
    units = heads * config.row_tiles
    each = shared.chunks_each(chunks, units)
    num_splits = -(-chunks // each)
    num_lines = tree_nodes(num_splits, config.fan_in)
    partial = heads * num_lines * problem.num_queries * problem.group * (plan.block_dv + 2) if may_split else 0
    return DecodeLaunch(
        flashcore_hopper_decode,
        (num_splits, units) if shared.in_a_row else (units, num_splits),
        0,
        partial,
        (*_strides(query), *_strides(key), *_strides(value), 0 if key_range is None else key_range.stride(0)),
        (
            problem.num_queries, problem.num_keys, problem.query_start, problem.left, problem.right, num_splits,
            each, num_lines, *score_factors(problem)[:2],
        ),
        (config,),
        decode_options(config),
    )  # fmt: skip


def tree_nodes(leaves: int, fan_in: int) -> int:
    """Nodes on all levels of a tree whose nodes have up to `fan_in` children; one leaf is a tree."""
    nodes = level = leaves
    while level > 1:
        level = -(-level // fan_in)
        nodes += level
    return nodes


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

"""From a Problem to a launch of `flashcore_hopper_short`: tensor descriptors, grid, constants."""

import torch

from ...dropout import drop_threshold
from ...problem import Inputs, Problem
from ...runtime.launch import Launch, Tile
from ..descriptors import descriptor
from .choose import ShortConfig
from .kernel import PrefillConstants
from .short import flashcore_hopper_short
from .table import SHORT_HEAD_DIM


def short_constants(problem: Problem, config: ShortConfig, has_lse: bool) -> PrefillConstants:
    """What the kernel for this call is compiled for."""
    return PrefillConstants(
        d0=SHORT_HEAD_DIM, d1=0, dv0=SHORT_HEAD_DIM, dv1=0, block_n=config.block_n, consumers=1,
        stages=config.num_stages, range_layout=(None, "sequence").index(problem.range_layout), softcap=False,
        sinks=False, lse=has_lse, query_buffers=1, scores_ahead=False, short_masks=True,
        consumer_registers=config.row.registers, producer_registers=0, one_copy=True, turns=False,
        dropout=problem.dropout > 0.0,
    )  # fmt: skip


def make_launch(problem: Problem, config: ShortConfig, inputs: Inputs, output: torch.Tensor, has_lse: bool) -> Launch:
    """The launch that writes output `[B, H, Q, Dv]` and, where wanted, lse `[B, H, Q]` fp32."""
    query, key, value, key_range = inputs[:4]
    constants = short_constants(problem, config, has_lse)
    tiles_per_head = -(-problem.num_queries // config.block_m)
    shapes = (("query", query, config.block_m), ("key", key, config.block_n), ("value", value, config.block_n))
    return Launch(
        kernel=flashcore_hopper_short,
        grid=(problem.batch_size * problem.num_heads * tiles_per_head, 1),
        operands=(
            *(Tile.of(name, descriptor(tensor, rows, SHORT_HEAD_DIM)) for name, tensor, rows in shapes),
            "output", "lse", "key_range", "philox",
        ),
        integers=(),
        scalars=(
            problem.num_heads, problem.group, problem.num_queries, problem.num_keys,
            0 if key_range is None else key_range.stride(0), *(stride // 8 for stride in output.stride()[:3]),
            problem.value_dim // 8, problem.score_factors[0], tiles_per_head,
            drop_threshold(problem.dropout), 1.0 / (1.0 - problem.dropout),
        ),
        constants=(constants,),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        options={"maxnreg": config.row.registers},
    )  # fmt: skip

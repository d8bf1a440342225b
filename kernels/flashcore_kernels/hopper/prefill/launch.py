"""From a Problem to a launch of `flashcore_hopper`: tensor descriptors, grid, constants."""

import torch

from ...dropout import drop_threshold
from ...problem import Inputs, Problem, distinct
from ...runtime.launch import Launch, Tile
from ..descriptors import descriptor
from ..schedule import heads_in_section
from .choose import PrefillConfig
from .kernel import PrefillConstants, flashcore_hopper
from .mask_map import MapShape, make_map_launch, map_shape, vector_unit
from .masks import BIAS, BIAS_ROW, BOOL, NO_MASK


def _tile(operand: str, tensor: torch.Tensor, rows: int, columns: int) -> Tile | str:
    """How the copy engine fetches tiles `[1, 1, rows, columns]` of a `[B, H, S, D]` tensor; "absent" of no columns."""
    if not columns:
        return "absent"
    return Tile.of(operand, descriptor(tensor, rows, columns))


def kernel_constants(problem: Problem, config: PrefillConfig, has_lse: bool) -> PrefillConstants:
    """What the kernel for this call is compiled for."""
    row = config.row
    return PrefillConstants(
        d0=row.head_dim[0],
        d1=row.head_dim[1],
        dv0=row.value_dim[0],
        dv1=row.value_dim[1],
        block_n=row.block_n,
        consumers=row.consumers,
        stages=row.stages,
        range_layout=(None, "sequence", "rows").index(problem.range_layout),
        softcap=problem.softcap > 0.0,
        sinks=problem.has_sinks,
        lse=has_lse,
        query_buffers=row.query_buffers,
        scores_ahead=row.scores_ahead,
        short_masks=row.short_masks,
        consumer_registers=row.consumer_registers,
        producer_registers=row.producer_registers,
        one_copy=row.one_copy,
        turns=row.turns,
        mask=_mask_kind(problem),
        dropout=problem.dropout > 0.0,
    )


def _mask_kind(problem: Problem) -> int:
    """`PrefillConstants.mask`."""
    if problem.mask_kind == "float":
        return (BIAS if problem.mask_rows else BIAS_ROW).value
    return (NO_MASK if problem.mask_kind is None else BOOL).value


def fitted(problem: Problem, inputs: Inputs) -> Inputs:
    """`inputs`, with a mask copied where its rows cannot be fetched in units of 16 bytes: into such rows, without gaps.

    It is copied as it is, without what `expand` made of it. A bias in float64 or 8 bits becomes float32. One row for
    all queries, whose elements are read one by one, is not copied, and neither is one value for all keys that is no
    bias.
    """
    mask = distinct(inputs.mask)
    is_bias = problem.mask_kind == "float"
    if is_bias and mask.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        mask = mask.float()
    has_columns = mask.shape[3] == problem.num_keys
    if problem.mask_rows and (has_columns or is_bias) and not (has_columns and vector_unit(mask) > 1):
        unit = 16 // mask.element_size()
        whole = mask.new_empty(*mask.shape[:3], -(-problem.num_keys // unit) * unit)
        mask = whole[..., : problem.num_keys].copy_(mask)
    return inputs._replace(mask=mask)


def _mask_numbers(problem: Problem, mask: torch.Tensor, shape: MapShape) -> tuple[int, ...]:
    """The fields of a DenseMask from `line_b` on."""
    bias = (0, 0, 0)
    if problem.mask_kind == "float" and problem.mask_rows:
        bias = (int(mask.shape[0] > 1), int(mask.shape[1] > 1), 0)
    elif problem.mask_kind == "float":
        bias = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))
        bias = (bias[0], bias[1], bias[3])
    return (*shape.line_strides, *shape.row_strides, *bias, shape.num_blocks)


def make_launch(problem: Problem, config: PrefillConfig, inputs: Inputs, output: torch.Tensor, has_lse: bool) -> Launch:
    """The launch of `flashcore_hopper` that writes output `[B, H, Q, Dv]` and, where wanted, lse `[B, H, Q]` fp32.

    A mask is as `fitted` leaves it, and bool as bytes. Its map is made by a launch before this one.
    """
    query, key, value, key_range, mask = inputs[:5]
    row = config.row
    d0, d1 = row.head_dim
    dv0, dv1 = row.value_dim
    rows = 128 if row.one_copy else 64
    all_heads = problem.batch_size * problem.num_heads
    tiles_per_head = -(-problem.num_queries // config.block_m)
    bytes_per_key = 2 * (problem.head_dim + problem.value_dim)
    section = 1
    if problem.right >= 0 or key_range is not None or mask is not None:  # tiles may differ in length
        section = heads_in_section(
            problem.num_keys, bytes_per_key, all_heads, problem.group, tiles_per_head, config.processors,
            row.least_rounds,
        )  # fmt: skip
    output_tiles = ("absent", "absent")
    if not row.one_copy:
        columns = dv0 if row.query_buffers == 2 else dv0 // 2
        output_tiles = (_tile("output", output, 64, columns), _tile("output", output, 64, dv1))
    before, map_words, mask_operands, mask_numbers = None, (0, 0), ("absent",) * 4, (0,) * 10
    if mask is not None:
        mask = distinct(mask)
        shape = map_shape(mask, problem.num_keys, config.block_m, config.block_n)
        before, map_words = make_map_launch(problem, mask, shape), (shape.line_words, shape.bit_words)
        mask_numbers = _mask_numbers(problem, mask, shape)
        tile = row_bias = "absent"
        if problem.mask_kind == "float" and problem.mask_rows:
            tile = Tile.of("mask", descriptor(mask, 64, row.block_n))
        elif problem.mask_kind == "float":
            row_bias = "mask"
        mask_operands = (tile, row_bias, "mask_lines", "mask_bits")
    range_strides = (0, 0) if key_range is None else (key_range.stride(0), key_range.stride(2))
    return Launch(
        kernel=flashcore_hopper,
        grid=(min(config.processors, all_heads * tiles_per_head), 1),
        operands=(
            _tile("query", query, rows, d0), _tile("query", query, rows, d1),
            _tile("key", key, row.block_n, d0), _tile("key", key, row.block_n, d1),
            _tile("value", value, row.block_n, dv0), _tile("value", value, row.block_n, dv1), *output_tiles,
            "lse", "key_range", "sinks", "output" if row.one_copy else "absent", "counters", *mask_operands,
            "philox",
        ),
        integers=(),
        scalars=(
            problem.num_heads, problem.group, problem.num_queries, problem.num_keys, problem.query_start,
            problem.left, problem.right, *range_strides, *(stride // 8 for stride in output.stride()[:3]),
            problem.value_dim // 8, *problem.score_factors[:2], all_heads, tiles_per_head, section,
            *mask_numbers, drop_threshold(problem.dropout), 1.0 / (1.0 - problem.dropout),
        ),
        constants=(kernel_constants(problem, config, has_lse),),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        counters=1 if before is None else max(1, before.counters),
        map_words=map_words,
        before=before,
    )  # fmt: skip

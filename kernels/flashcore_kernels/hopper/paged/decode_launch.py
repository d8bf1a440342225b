"""From a PagedProblem to a launch of `flashcore_hopper_paged_decode`: grid, workspace, constants."""

import functools
from typing import NamedTuple

import torch

from ...paged_problem import PagedProblem
from ...plan import most_chunks
from ...runtime.launch import launch
from ...runtime.workspace import forget, workspace
from ..decode import launch as unpaged
from ..decode.choose import HopperDecodeConfig
from ..decode.sharing import share_out
from .decode import PagedDecodeConstants, flashcore_hopper_paged_decode


class Shares(NamedTuple):
    """How the programs of a call share out its keys.

    Attributes:
        constants: what the kernel is compiled for.
        grid: number of programs, (x, y).
        num_splits, chunks_each, row_nodes: as `flashcore_hopper_decode` takes them.
        partials: int32 words of mailboxes.
    """

    constants: PagedDecodeConstants
    grid: tuple[int, int]
    num_splits: int
    chunks_each: int
    row_nodes: int
    partials: int


@functools.lru_cache(1024)  # it takes longer than the launch, and a server asks the same in every layer
def shares(problem: PagedProblem, config: HopperDecodeConfig, steps: tuple[int, int], has_lse: bool) -> Shares:
    """The Shares of a call.

    Args:
        steps: elements from a key to the next within a page, and from a value; 0: only known at run time.
    """
    single = problem.single
    chunks = most_chunks(single.num_keys, config.min_chunk, config.max_chunks)
    sharing = share_out(single, config)
    may_split = chunks > 1
    common = vars(unpaged.kernel_constants(single, config, sharing, *steps, may_split, has_lse)) | {"range": False}
    constants = PagedDecodeConstants(
        **common, page_size=problem.page_size, ring=problem.ring, new_keys=problem.new_keys,
        cumulative=problem.cumulative,
    )  # fmt: skip
    heads = problem.num_sequences * problem.num_kv_heads
    tiles = heads * constants.row_tiles
    each = sharing.chunks_each(chunks, tiles)
    num_splits = -(-chunks // each)
    row_nodes = unpaged.tree_nodes(num_splits, constants.fan_in)
    return Shares(
        constants=constants,
        grid=(num_splits, tiles) if sharing.in_a_row else (tiles, num_splits),
        num_splits=num_splits,
        chunks_each=each,
        row_nodes=row_nodes,
        partials=heads * problem.group * row_nodes * (config.block_dv + 2) if may_split else 0,
    )


def run_single(
    problem: PagedProblem,
    config: HopperDecodeConfig,
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    new_key: torch.Tensor | None,
    new_value: torch.Tensor | None,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    key_lengths: torch.Tensor,
    sinks: torch.Tensor | None,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    padding: bool,
) -> None:
    """Launch on the current stream of query's device: writes the rows of output `[T, H, Dv]` and, where given, of lse
    `[H, T]` of sequences that have one query.

    Args:
        padding: no sequence has more than one, and the padding is written too.
    """
    steps = _step(key_pages), _step(value_pages)
    constants, grid, num_splits, chunks_each, row_nodes, partials = shares(problem, config, steps, lse is not None)
    new_strides = (0,) * 4 if new_key is None else (*_sixteens(new_key), *_sixteens(new_value))
    try:
        launch(
            flashcore_hopper_paged_decode,
            grid,
            (
                query, key_pages, value_pages, new_key, new_value, output, lse, block_table, cu_seqlens_q, key_lengths,
                sinks, key_scale, value_scale, workspace(partials, 0, query.device)[0],
            ),
            (
                problem.num_sequences, problem.num_tokens, problem.table_width, problem.num_pages, problem.left,
                problem.right, num_splits, chunks_each, row_nodes, block_table.stride(0), *_sixteens(query),
                *_sixteens(key_pages), *_sixteens(value_pages), *new_strides, int(padding),
                *problem.single.score_factors[:2],
            ),
            (constants,),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **unpaged.compiler_options(constants),
        )  # fmt: skip
    except BaseException:
        forget(query.device)
        raise


def _step(pages: torch.Tensor) -> int:
    """Elements from a key to the next, for pages whose heads lie outside or inside of their keys."""
    _, _, heads, size = pages.shape
    step = pages.stride(1)
    return step if step in (size, heads * size) else 0


def _sixteens(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of all dimensions but the last in units of 16 bytes; those that are never used may be anything."""
    elements = unpaged.ALIGNMENT // tensor.element_size()
    sizes = zip(tensor.shape[:-1], tensor.stride()[:-1])
    return tuple(0 if size == 1 else stride // elements for size, stride in sizes)

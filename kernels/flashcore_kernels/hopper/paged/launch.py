"""From a PagedProblem to a launch of `flashcore_hopper_paged`: tensor descriptors, grid, constants."""

import functools

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...paged_problem import PagedProblem
from ...runtime.launch import launch
from ...runtime.workspace import forget, workspace
from .choose import PromptConfig
from .kernel import PagedConstants, flashcore_hopper_paged

_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def run_prompts(
    problem: PagedProblem,
    config: PromptConfig,
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    key_lengths: torch.Tensor,
    sinks: torch.Tensor | None,
) -> None:
    """Launch on the current stream of query's device: writes the rows of output `[T, H, Dv]` and, where given, of lse
    `[H, T]` that are no sequence's single token.
    """
    constants = kernel_constants(problem, config, lse is not None)
    units = problem.num_heads // config.pack
    # No sequence has more than one tile that is not full, and the padding has one.
    most_tiles = (problem.num_tokens // config.tokens + problem.num_sequences + 1) * units
    try:
        launch(
            flashcore_hopper_paged,
            min(config.processors, most_tiles),
            (
                query_descriptor(query, constants), pool_descriptor(key_pages, constants.d0, constants),
                pool_descriptor(value_pages, constants.dv0, constants), output, lse, block_table, cu_seqlens_q,
                key_lengths, sinks, workspace(0, 1, query.device)[1],
            ),
            (
                problem.num_sequences, problem.num_tokens, units, problem.group // config.pack, problem.left,
                problem.right, block_table.stride(0), problem.table_width, problem.num_pages, problem.value_dim // 8,
                *problem.single.score_factors[:2],
            ),
            (constants,),
            num_warps=4,
            num_stages=config.row.stages,
        )  # fmt: skip
    except BaseException:
        forget(query.device)
        raise


def kernel_constants(problem: PagedProblem, config: PromptConfig, has_lse: bool) -> PagedConstants:
    """What the kernel for this call is compiled for."""
    row = config.row
    return PagedConstants(
        d0=row.head_dim,
        d1=0,
        dv0=row.head_dim,
        dv1=0,
        block_n=row.block_n,
        consumers=2,
        stages=row.stages,
        range_layout=0,
        softcap=problem.softcap > 0.0,
        sinks=problem.has_sinks,
        lse=has_lse,
        query_buffers=2,
        scores_ahead=True,
        short_masks=row.short_masks,
        consumer_registers=row.consumer_registers,
        producer_registers=row.producer_registers,
        one_copy=False,
        turns=False,
        pack=config.pack,
        page_size=problem.page_size,
        cumulative=problem.cumulative,
    )


def query_tile(constants: PagedConstants) -> list[int]:
    """Shape of a tile of `[units, T, pack, D]`."""
    return [1, constants.rows // constants.pack, constants.pack, constants.d0]


def pool_tile(columns: int, constants: PagedConstants) -> list[int]:
    """Shape of a tile of `[pages, Hkv, page_size, D]`: a block's keys, or of a small page all, in swizzled columns."""
    return [1, 1, constants.box, columns if constants.box == constants.block_n else 64]


@functools.cache
def tile_layout(shape: tuple[int, ...], dtype: torch.dtype):
    """How a tile lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(shape), _DTYPES[dtype])


def query_descriptor(query: torch.Tensor, constants: PagedConstants) -> TensorDescriptor:
    """How the copy engine fetches tiles of queries `[T, H, D]`."""
    num_tokens, num_heads, head_dim = query.shape
    token, head, _ = query.stride()
    pack = constants.pack
    return _descriptor(
        query, [num_heads // pack, num_tokens, pack, head_dim], [head * pack, token, head], query_tile(constants)
    )


def pool_descriptor(pages: torch.Tensor, columns: int, constants: PagedConstants) -> TensorDescriptor:
    """How the copy engine fetches tiles of a pool `[pages, page_size, Hkv, D]`."""
    num_pages, page_size, num_kv_heads, size = pages.shape
    page, key, head, _ = pages.stride()
    shape, strides = [num_pages, num_kv_heads, page_size, size], [page, head, key]
    return _descriptor(pages, shape, strides, pool_tile(columns, constants))


def _descriptor(tensor: torch.Tensor, shape: list[int], strides: list[int], tile: list[int]) -> TensorDescriptor:
    # Where there is but one index its stride is never used and may be anything; the engine wants multiples of 16 bytes.
    strides = [stride if size > 1 else 8 for size, stride in zip(shape, strides)]
    return TensorDescriptor(tensor, shape, [*strides, 1], tile, tile_layout(tuple(tile), tensor.dtype))

"""The launch of `flashcore_paged`."""

import torch

from ...device import Device
from ...plan import most_chunks
from ...problem import LOG2_E
from ...runtime.launch import launch
from ...runtime.workspace import forget, workspace
from .choose import PagedConfig, PagedProblem, shares
from .kernel import flashcore_paged


def run_paged(
    problem: PagedProblem,
    config: PagedConfig,
    device: Device,
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
) -> None:
    """Launch on the current stream of query's device: writes output `[T, H, Dv]` and, where given, lse `[H, T]`."""
    group = problem.group
    row_tiles = -(-group // config.decode_m)
    heads = problem.num_sequences * problem.num_kv_heads
    # A chunk may be cut at a page where keys are seen from the middle of one on: one more.
    num_splits = most_chunks(problem.most_keys + config.chunk_unit, config.min_chunk, config.max_chunks)
    programs_each = shares(problem, config, device)
    decode_programs = heads * row_tiles * programs_each
    prompts = problem.max_queries > 1 or problem.num_tokens > problem.num_sequences
    programs = decode_programs
    if prompts:
        programs += (problem.num_tokens * group // config.block_m + problem.num_sequences + 1) * problem.num_kv_heads
    may_split = num_splits > 1
    partials = heads * num_splits * group * (config.block_dv + 2) if may_split else 0
    counters = heads * row_tiles if may_split else 0
    new_strides = (0, 0, 0, 0)
    if new_key is not None:
        new_strides = (*new_key.stride()[:2], *new_value.stride()[:2])
    factors = (problem.scale * LOG2_E, 0.0, 1.0)
    if problem.softcap:
        factors = (problem.scale / problem.softcap, problem.softcap * LOG2_E, 1.0)
    try:
        launch(
            flashcore_paged,
            programs,
            (
                query, key_pages, value_pages, output, lse, new_key, new_value, block_table, cu_seqlens_q, key_lengths,
                sinks, key_scale, value_scale, *workspace(partials, counters, query.device), *query.stride()[:2],
                *key_pages.stride()[:3], *value_pages.stride()[:3], *output.stride()[:2], *new_strides,
                block_table.stride(0), problem.num_kv_heads, group,
            ),
            (
                problem.num_tokens, problem.num_sequences, problem.table_width, problem.num_pages, problem.left,
                problem.right, num_splits, programs_each, decode_programs, *factors,
            ),
            (
                problem.head_dim, problem.value_dim, config.block_d, config.block_dv, config.block_m, config.block_n,
                config.decode_m, config.decode_n, max(min(config.decode_m, 512 // config.block_dv), 1),
                config.min_chunk, config.max_chunks, config.chunk_unit, may_split, prompts, problem.page_size,
                problem.ring, _whole(problem, config.block_n),
                _whole(problem, config.decode_n) and config.chunk_unit % config.decode_n == 0 < config.chunk_unit,
                problem.cumulative, problem.dtype == torch.float32, problem.softcap > 0.0, problem.has_sinks,
                lse is not None,
            ),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip
    except BaseException:
        forget(query.device)
        raise


def _whole(problem: PagedProblem, block_n: int) -> bool:
    """Whether no block of keys, on a grid from the sequence's first key on, lies on two pages."""
    return not problem.new_keys and problem.page_size % block_n == 0 and problem.ring % block_n == 0

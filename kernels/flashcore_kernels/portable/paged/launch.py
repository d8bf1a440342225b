"""The launch of `flashcore_paged`."""

import torch

from ...device import Device
from ...paged_problem import PagedProblem
from ...plan import most_chunks
from ...problem import LOG2_E
from ...runtime.launch import launch
from ...runtime.workspace import forget, workspace
from .choose import PagedConfig, shares
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
    *,
    single: bool,
    prompts: bool,
) -> None:
    """Launch on the current stream of query's device: writes output `[T, H, Dv]` and, where given, lse `[H, T]`.

    Args:
        single, prompts: whether sequences of one query, and others beside the padding, are its own. What is not has
            to be written by another launch.
    """
    group = problem.group
    row_tiles = -(-group // config.decode_m)
    heads = problem.num_sequences * problem.num_kv_heads
    num_splits = most_splits(problem, config)
    programs_each = shares(problem, config, device)
    decode_programs = heads * row_tiles * programs_each if single else 0
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
            tuple(kernel_constants(problem, config, lse is not None, prompts).values()),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip
    except BaseException:
        forget(query.device)
        raise


def most_splits(problem: PagedProblem, config: PagedConfig) -> int:
    """Most chunks of a single token's keys: one more where keys are seen from the middle of a page on."""
    return most_chunks(problem.most_keys + config.chunk_unit, config.min_chunk, config.max_chunks)


def kernel_constants(problem: PagedProblem, config: PagedConfig, has_lse: bool, prompts: bool) -> dict:
    """The kernel's constexpr parameters, in its order."""
    aligned = config.chunk_unit > 0 and config.chunk_unit % config.decode_n == 0
    return {
        "HEAD_DIM": problem.head_dim,
        "VALUE_DIM": problem.value_dim,
        "BLOCK_D": config.block_d,
        "BLOCK_DV": config.block_dv,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "DECODE_M": config.decode_m,
        "DECODE_N": config.decode_n,
        "DECODE_STAGES": config.decode_stages,
        "NEW_STAGES": (config.num_stages + 1) // 2,
        "MERGE_ROWS": max(min(config.decode_m, 512 // config.block_dv), 1),
        "MIN_CHUNK": config.min_chunk,
        "MAX_SPLITS": config.max_chunks,
        "CHUNK_UNIT": config.chunk_unit,
        "MAY_SPLIT": most_splits(problem, config) > 1,
        "PROMPTS": prompts,
        "PADDING": not problem.several,
        "PAGE_SIZE": problem.page_size,
        "RING": problem.ring,
        "WHOLE": _whole(problem, config.block_n),
        "DECODE_WHOLE": aligned and _whole(problem, config.decode_n),
        "CUMULATIVE": problem.cumulative,
        "EXACT": problem.dtype == torch.float32,
        "SOFTCAP": problem.softcap > 0.0,
        "HAS_SINKS": problem.has_sinks,
        "HAS_LSE": has_lse,
    }


def _whole(problem: PagedProblem, block_n: int) -> bool:
    """Whether no block of keys, on a grid from the sequence's first key on, lies on two pages."""
    return not problem.new_keys and problem.page_size % block_n == 0 and problem.ring % block_n == 0

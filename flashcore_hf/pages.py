"""Attention of one layer in continuous batching: its keys and values are read where they are kept, in pages."""

from contextvars import ContextVar
from typing import NamedTuple

import torch
from flashcore_kernels import Pages, paged_attention, write_pages

# What continuous batching hands to every layer and a call on pages has read, or has no use for.
READ_FOR_PAGES = frozenset("read_index write_index block_table k_cache v_cache cache".split())

# Whether a batch of continuous batching that `serving` has taken over runs: its layers need no masks.
in_batch: ContextVar[bool] = ContextVar("flashcore_in_batch", default=False)


class PagedCall(NamedTuple):
    """Where a layer's keys and values are.

    Attributes:
        pages: of this layer.
        single: no sequence has more than one new token.
    """

    pages: Pages
    single: bool


def call_on_pages(cache, layer_idx: int, kwargs: dict) -> PagedCall | None:
    """The PagedCall of a layer, where `cache` is continuous batching's and `serving` has taken it over; else None."""
    find = getattr(cache, "flashcore_pages", None)
    return None if find is None else find(layer_idx, kwargs)


def attend_pages(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: PagedCall,
    *,
    causal: bool,
    sliding_window: int | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention on the pages of a layer, and its new keys and values into them.

    Args:
        query: `[1, H, T, D]`, the new tokens of all sequences in a row, and perhaps padding behind them.
        key, value: `[1, Hkv, T, D]` and `[1, Hkv, T, Dv]`, those of the new tokens.
        sliding_window: tokens that a query sees, itself included.

    Returns:
        `[1, T, H, Dv]`.

    Raises:
        NotImplementedError: the layer is not causal, or its window is not the one that its pages are kept for.
    """
    if not causal:
        raise NotImplementedError("continuous batching was asked of a layer that is not causal; only causal ones work")
    ring = call.pages.ring
    if ring and (sliding_window is None or sliding_window > ring):
        raise NotImplementedError(
            f"continuous batching keeps the last {ring} keys of this layer, and it asks for attention to "
            f"{sliding_window or 'all of them'}. Call model.set_attn_implementation('sdpa') first"
        )
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, heads, D]
    new = {}
    # In a ring the new keys take the places of keys that the first of several new tokens still see.
    after = bool(ring) and not call.single
    if after:
        new = {"new_key": key, "new_value": value}
    else:
        write_pages(call.pages, key, value)
    output = paged_attention(
        query, call.pages, **new, max_queries=1 if call.single else None, is_causal=True, window=sliding_window,
        scale=scaling, softcap=softcap, sinks=sinks,
    )  # fmt: skip
    if after:
        write_pages(call.pages, key, value)
    return output[None]

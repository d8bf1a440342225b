"""Caches in pages: where a token lies, new tokens into their places, and a sequence's pages behind each other."""

import torch


def gather_pages(pool: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """The pages of each sequence behind each other: `[B, blocks * page_size, heads, D]`.

    Right, and slow: every key is copied, which `paged.py` spares most calls. What a block -1 stands for is some page's,
    and must not be seen.

    Args:
        pool: `[pages, page_size, heads, D]`, any strides with a unit innermost one.
        block_table: int `[B, blocks]`.
    """
    pages = block_table.clamp(min=0).flatten()
    as_bytes = pool.view(torch.uint8) if pool.dtype == torch.float8_e4m3fn else pool
    gathered = as_bytes.index_select(0, pages).view(pool.dtype)
    return gathered.view(block_table.shape[0], -1, *pool.shape[2:])


def places(
    slot: torch.Tensor, row: torch.Tensor, capacity: int, block_table: torch.Tensor | None, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row, offset, there): where in a cache `[rows, page_size, heads, D]` token `slot` of a sequence lies.

    Args:
        slot: int64 `[N]`.
        row: int64 `[N]`, the cache's row of the token's sequence, or the sequence's line of block_table.
        capacity: slots that a sequence has.
        block_table: int `[B, blocks]`, or None where a sequence is one row.

    Returns:
        int64 `[N]`, int64 `[N]`, bool `[N]`: False for a token that has no place.
    """
    there = (slot >= 0) & (slot < capacity)
    slot = slot.clamp(0, capacity - 1)
    if block_table is None:
        return row, slot, there
    page = block_table[row, torch.div(slot, page_size, rounding_mode="floor")].to(torch.int64)
    return page.clamp(min=0), slot % page_size, there & (page >= 0)


def write(cache: torch.Tensor, states: torch.Tensor, row: torch.Tensor, offset: torch.Tensor, there: torch.Tensor):
    """cache[row, offset] = states, in place, for the tokens that are there; without a synchronisation.

    Args:
        cache: `[rows, page_size, heads, D]`.
        states: `[N, heads, D]`, of cache's dtype.
        row, offset, there: what `places` returns.
    """
    if cache.dtype == torch.float8_e4m3fn:
        cache, states = cache.view(torch.uint8), states.view(torch.uint8)  # index_put_ takes bytes
    # A token without a place repeats what one that is there writes. Where none is there, all write back what was.
    # (An index of no dimensions would be read on the host; this one has one.)
    some = there.to(torch.int8).argmax(0, keepdim=True)
    any_there = there[some]
    row, offset = (torch.where(there, at, torch.where(any_there, at[some], 0)) for at in (row, offset))
    other = torch.where(any_there[:, None, None], states[some], cache[:1, 0])
    cache[row, offset] = torch.where(there[:, None, None], states, other)

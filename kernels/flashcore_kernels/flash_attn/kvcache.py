"""flash_attn_with_kvcache: new tokens into a cache, in rows or in pages, and attention to all that it then holds."""

from typing import NamedTuple

import torch

from ..cache.paged import Pages, paged_attention, write_pages
from .engine import attend_batch, attend_packed
from .options import Window, options_of
from .paged import pages_of, rows_as_pages
from .pages import gather_pages, places, write
from .rotary import check_rotary, rotate
from .varlen import check_ints


class _Cache(NamedTuple):
    """A cache and who holds what of it.

    Attributes:
        k, v: `[rows, S, Hkv, D]` and Dv, or `[pages, page_size, Hkv, D]` and Dv with a table.
        table: int `[B, blocks]`, or None.
        row: int64 `[B]`, the row of each sequence, or None where sequence b's is row b.
        lengths: tokens that each sequence held before the call: an int for all, int64 `[B]`, or None: all slots.
            Below 0 a sequence is none: it is not written, and sees nothing.
        batch_size: B.
        capacity: slots of a sequence.
    """

    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor | None
    row: torch.Tensor | None
    lengths: int | torch.Tensor | None
    batch_size: int
    capacity: int


@torch.no_grad()
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    qv: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | torch.Tensor | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    attention_chunk: int = 0,
    scheduler_metadata: torch.Tensor | None = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    s_aux: torch.Tensor | None = None,
):
    """Write new tokens into a cache in place, and attend to all that it then holds. No gradients, as there.

    The queries are the last of what a sequence then holds: query i stands at slot lengths + new - Sq + i. Lengths and
    tables are read on the device: one CUDA graph serves every length.

    Args:
        q: `[B, Sq, H, D]`; with cu_seqlens_q `[T, H, D]`.
        k_cache, v_cache: `[rows, S, Hkv, D]` and Dv; with block_table `[pages, page_size, Hkv, D]` and Dv. Any page
            size, any strides with a unit innermost one. Slots that are not filled may hold anything.
        k, v: new tokens, `[B, n, Hkv, D]` and Dv; with cu_seqlens_k_new `[Tn, Hkv, D]` and Dv. They go behind the
            cache_seqlens tokens that are there. Tokens behind the cache's end are not written; where that is known
            without asking a GPU, it is an error.
        rotary_cos, rotary_sin: `[positions, R / 2]`: k and q are turned, at positions cache_seqlens, cache_seqlens + 1
            and so on; all queries at cache_seqlens where neither causal nor window_size is given.
        cache_seqlens: tokens in the cache: an int, int32 `[B]`, or None: all slots. A sequence of -1 is none: nothing
            is written for it, and its output is zeros.
        cache_batch_idx: int32 `[B]`, each sequence's row of the cache (or of block_table); None: row b.
        cache_leftpad: int32 `[B]`, slots before a sequence's first token.
        block_table or page_table: int32 `[B, blocks]`, the pages of each sequence, -1 for none.
        rotary_interleaved: pairs are dimensions (0, 1), (2, 3), ...; else (0, R / 2), (1, R / 2 + 1), ...
        cu_seqlens_q, cu_seqlens_k_new: int32 `[B + 1]`, offsets of each sequence in q, and in k and v.
        rotary_seqlens: int32 `[B]`, positions in place of cache_seqlens.
        num_splits, scheduler_metadata, pack_gqa, max_seqlen_q: of no effect.
        Others as in `flash_attn_func`.

    Returns:
        out `[B, Sq, H, Dv]`, or `[T, H, Dv]`; with return_softmax_lse (out, softmax_lse), float32 `[B, H, Sq]`, or
        `[H, T]`.

    Raises:
        ValueError: an argument does not fit; nothing was written.
        NotImplementedError: sm_margin; an ALiBi mask that is too large.
    """
    options = options_of(
        softmax_scale, causal, window_size, softcap, alibi_slopes=alibi_slopes, attention_chunk=attention_chunk, qv=qv,
        descales=(q_descale, k_descale, v_descale), s_aux=s_aux, sm_margin=sm_margin,
    )  # fmt: skip
    if block_table is not None and page_table is not None:
        raise ValueError("block_table and page_table are two names of one argument: give one")
    table = page_table if block_table is None else block_table
    batch_size = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    cache = _cache_of(q, k_cache, v_cache, batch_size, table, cache_batch_idx, cache_seqlens)
    if cache_leftpad is not None:
        check_ints("cache_leftpad", cache_leftpad, (batch_size,), q.device)
    if cu_seqlens_q is not None:
        check_ints("cu_seqlens_q", cu_seqlens_q, (batch_size + 1,), q.device)
    check_rotary(rotary_cos, rotary_sin, k, q.shape[-1])
    if (k is None) != (v is None):
        raise ValueError("k and v: one is None; give both, or neither to attend to the cache alone")
    if k is None and cu_seqlens_k_new is not None:
        raise ValueError("cu_seqlens_k_new: there are no new tokens, k and v, that it could be of")
    end = cache.lengths
    if k is not None:
        end = _check_new(cache, k, v, cu_seqlens_k_new)
        if rotary_cos is not None:
            moving = options.right >= 0 or options.left >= 0
            start = _per_sequence(cache.lengths if rotary_seqlens is None else rotary_seqlens, batch_size, q.device)
            q = _rotated(q, rotary_cos, rotary_sin, start, cu_seqlens_q, moving, rotary_interleaved)
            k = _rotated(k, rotary_cos, rotary_sin, start, cu_seqlens_k_new, True, rotary_interleaved)
        if not _append_pages(q, cache, k, v, cu_seqlens_k_new, end, options):
            _append(cache, k, v, cu_seqlens_k_new)
    out, lse = _attend(q, cache, end, cache_leftpad, cu_seqlens_q, options, return_softmax_lse)
    return (out, lse) if return_softmax_lse else out


def _cache_of(q, k_cache, v_cache, batch_size, table, cache_batch_idx, cache_seqlens) -> _Cache:
    """Check a cache and its holders against each other."""
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.dim() != 4 or tensor.shape[:3] != k_cache.shape[:3]:
            raise ValueError(
                f"{name}: got {list(tensor.shape)}; [rows, seqlen, heads, head_dim], or [pages, page_size, heads, "
                "head_dim] with a block_table, is needed, for both the same but for head_dim"
            )
    _check_heads(q, k_cache)
    if cache_batch_idx is not None:
        check_ints("cache_batch_idx", cache_batch_idx, (batch_size,), q.device)
    holders = k_cache.shape[0] if table is None else table.shape[0]
    if table is not None and (table.dim() != 2 or table.device != q.device):
        raise ValueError(f"block_table: got {list(table.shape)} on {table.device}; [batch, blocks] on {q.device}")
    if cache_batch_idx is None and holders != batch_size:
        raise ValueError(
            f"{'k_cache' if table is None else 'block_table'}: got {holders} rows for {batch_size} sequences; a row a "
            "sequence is needed, or cache_batch_idx"
        )
    lengths = cache_seqlens
    if isinstance(lengths, torch.Tensor):
        if lengths.dim() == 0:
            lengths = lengths.expand(batch_size)
        check_ints("cache_seqlens", lengths, (batch_size,), q.device)
        lengths = lengths.to(torch.int64)
    capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])
    _check_room("cache_seqlens", lengths, capacity)
    row = None if cache_batch_idx is None else cache_batch_idx.to(torch.int64)
    return _Cache(k_cache, v_cache, table, row, lengths, batch_size, capacity)


def _check_heads(q: torch.Tensor, k_cache: torch.Tensor) -> None:
    fits = q.dim() in (3, 4) and q.shape[-1] == k_cache.shape[3] and q.shape[-2] % max(k_cache.shape[2], 1) == 0
    if not fits or (q.dtype != k_cache.dtype and k_cache.dtype != torch.float8_e4m3fn):
        raise ValueError(
            f"q and k_cache: got {q.dtype} {list(q.shape)} and {k_cache.dtype} {list(k_cache.shape)}; one dtype (or a "
            "cache in float8_e4m3fn), one head_dim, and heads that are a multiple of the cache's are needed"
        )


def _check_room(what: str, end: int | torch.Tensor | None, capacity: int) -> None:
    """Raise where it is known without asking a GPU that a cache is too small."""
    known = isinstance(end, int) or (isinstance(end, torch.Tensor) and end.device.type == "cpu")
    if not known or torch.compiler.is_compiling():
        return
    longest = end if isinstance(end, int) else int(end.max()) if end.numel() else 0
    if longest > capacity:
        raise ValueError(
            f"{what}: a sequence would hold {longest} tokens, and the cache (its block_table, where there is one) has "
            f"room for {capacity}. Nothing was written"
        )


def _check_new(cache: _Cache, k, v, cu_seqlens_k_new) -> int | torch.Tensor:
    """What each sequence holds with the new tokens."""
    if cache.lengths is None:
        raise ValueError("cache_seqlens: it says where new tokens go, and is needed with k and v")
    lead = (cache.batch_size,) if cu_seqlens_k_new is None else ()
    for name, new, held in (("k", k, cache.k), ("v", v, cache.v)):
        fits = new.dim() == 3 + len(lead) and new.shape[:-2] == k.shape[:-2] and new.shape[: len(lead)] == lead
        if not fits or new.shape[-2:] != held.shape[2:] or new.dtype != held.dtype:
            wanted = [*lead, "new tokens", *held.shape[2:]]
            raise ValueError(f"{name}: got {new.dtype} {list(new.shape)}; {held.dtype} {wanted} is needed")
    if cu_seqlens_k_new is None:
        end = cache.lengths + k.shape[1]
    else:
        check_ints("cu_seqlens_k_new", cu_seqlens_k_new, (cache.batch_size + 1,), k.device)
        end = cache.lengths + cu_seqlens_k_new.diff().to(torch.int64)
    _check_room("k and v", end, cache.capacity)
    if isinstance(cache.lengths, torch.Tensor):
        return torch.where(cache.lengths < 0, 0, end)
    return end if isinstance(end, torch.Tensor) or cache.lengths >= 0 else 0


def _per_sequence(lengths: int | torch.Tensor, batch_size: int, device: torch.device) -> torch.Tensor:
    """int64 `[B]`."""
    if isinstance(lengths, int):
        return torch.full((batch_size,), lengths, dtype=torch.int64, device=device)
    return lengths.to(torch.int64)


def _owners(cu_seqlens: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sequence, which of its tokens), int64 `[T]` each, of tokens behind each other."""
    token = torch.arange(total, device=cu_seqlens.device)
    cu_seqlens = cu_seqlens.to(torch.int64)
    sequence = (torch.searchsorted(cu_seqlens, token, right=True) - 1).clamp(0, cu_seqlens.shape[0] - 2)
    return sequence, token - cu_seqlens[sequence]


def _rotated(states, cos, sin, start, cu_seqlens, moving: bool, interleaved: bool) -> torch.Tensor:
    """Tokens turned at start, start + 1, ... of their sequence; all at start where they are not `moving`."""
    if cu_seqlens is None:
        positions = start[:, None] + (torch.arange(states.shape[1], device=states.device) if moving else 0)
    else:
        sequence, index = _owners(cu_seqlens, states.shape[0])
        positions = start[sequence] + (index if moving else 0)
    return rotate(states, cos, sin, positions, interleaved)


def _append(cache: _Cache, k: torch.Tensor, v: torch.Tensor, cu_seqlens_k_new: torch.Tensor | None) -> None:
    """New tokens into their slots."""
    if k.numel() == 0 or cache.capacity == 0:
        return
    lengths = _per_sequence(cache.lengths, cache.batch_size, k.device)
    real = True
    if cu_seqlens_k_new is None:
        count = k.shape[1]
        sequence = torch.arange(cache.batch_size, device=k.device).repeat_interleave(count)
        index = torch.arange(count, device=k.device).repeat(cache.batch_size)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    else:
        sequence, index = _owners(cu_seqlens_k_new, k.shape[0])
        real = index < cu_seqlens_k_new.diff()[sequence]
    held = lengths[sequence]
    row = sequence if cache.row is None else cache.row[sequence]
    row, offset, there = places(held + index, row, cache.capacity, cache.table, cache.k.shape[1])
    there = there & (held >= 0) & real
    write(cache.k, k, row, offset, there)
    write(cache.v, v, row, offset, there)


def _paged(q, cache: _Cache, cu_tokens: torch.Tensor | None, count: int, lengths, options) -> Pages | None:
    """The cache in pages, or None where no kernel for pages serves the call.

    Args:
        cu_tokens: where each sequence's tokens lie, or None where each has `count`.
        lengths: int `[B]`, keys of each sequence.
    """
    k, v, table = cache.k, cache.v, cache.table
    device = q.device
    if table is None:
        k, v = rows_as_pages(k), rows_as_pages(v)
        if k is None or v is None:
            return None
        each = cache.k.shape[1] // k.shape[1]
        row = torch.arange(cache.batch_size, device=device) if cache.row is None else cache.row
        table = row[:, None] * each + torch.arange(each, device=device)
    elif cache.row is not None:
        table = table.index_select(0, cache.row)
    if cu_tokens is None:
        cu_tokens = torch.arange(cache.batch_size + 1, device=device) * count
    return pages_of(q, k, v, table, cu_tokens, lengths, options)


def _append_pages(q, cache: _Cache, k, v, cu_seqlens_k_new, end, options) -> bool:
    """New tokens into their pages in one launch; False where no kernel does it, and nothing was written."""
    if not k.is_cuda or k.numel() == 0 or k.dtype == torch.float8_e4m3fn:
        return False
    # Not cut to the cache's end: it says where a token goes, and those behind the end are left out.
    lengths = _per_sequence(end, cache.batch_size, k.device)
    pages = _paged(q, cache, cu_seqlens_k_new, k.shape[1], lengths, options)
    if pages is None:
        return False
    if cu_seqlens_k_new is None:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    write_pages(pages, k, v)
    return True


def _attend(q, cache: _Cache, end, leftpad, cu_seqlens_q, options, return_lse):
    """(out, lse) of q `[B, Sq, H, D]`, or `[T, H, D]` with cu_seqlens_q."""
    packed = cu_seqlens_q is not None
    # Rows of their own, with as many queries each, are what kernels without pages are quickest at.
    if leftpad is None and (packed or cache.table is not None or cache.row is not None):
        held = cache.capacity if end is None else end
        lengths = _per_sequence(held, cache.batch_size, q.device).clamp(0, cache.capacity)
        pages = _paged(q, cache, cu_seqlens_q, q.shape[1], lengths, options)
        if pages is not None:
            said = paged_attention(
                q if packed else q.flatten(0, 1), pages, max_queries=None if packed else q.shape[1], is_causal=False,
                window=(options.left, options.right), scale=options.scale, softcap=options.softcap,
                sinks=options.sinks, return_lse=return_lse,
            )  # fmt: skip
            out, lse = said if return_lse else (said, None)
            if packed:
                return out, lse
            return out.unflatten(0, q.shape[:2]), None if lse is None else lse.unflatten(1, q.shape[:2]).transpose(0, 1)
    attend = _attend_documents if packed else _attend_rows
    return attend(q, cache, end, leftpad, cu_seqlens_q, options, return_lse)


def _gathered(cache: _Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v `[B, capacity, Hkv, D]` of the sequences. A copy, but for rows that are the sequences' own."""
    if cache.table is not None:
        table = cache.table if cache.row is None else cache.table.index_select(0, cache.row)
        return gather_pages(cache.k, table), gather_pages(cache.v, table)
    if cache.row is None:
        return cache.k, cache.v
    # Rows are pages too, of which a sequence has one.
    return gather_pages(cache.k, cache.row[:, None]), gather_pages(cache.v, cache.row[:, None])


def _attend_rows(q, cache: _Cache, end, leftpad, cu_seqlens_q, options, return_lse):
    """Attention of q `[B, Sq, H, D]`."""
    k, v = _gathered(cache)
    if isinstance(end, int):
        k, v, end = k[:, : max(end, 0)], v[:, : max(end, 0)], None
    elif end is not None:
        end = end.clamp(0, cache.capacity)
    if leftpad is not None and end is None:
        end = torch.full((cache.batch_size,), k.shape[1], dtype=torch.int64, device=q.device)
    return attend_batch(q, k, v, options, first=leftpad, end=end, return_lse=return_lse)


def _attend_documents(q, cache: _Cache, end, leftpad, cu_seqlens_q, options, return_lse):
    """Attention of q `[T, H, D]`: the cache's rows behind each other are the keys."""
    k, v = _gathered(cache)
    first = torch.arange(cache.batch_size, device=q.device) * cache.capacity
    end = first + (
        cache.capacity if end is None else _per_sequence(end, cache.batch_size, q.device).clamp(0, cache.capacity)
    )
    return attend_packed(
        q, k.flatten(0, 1), v.flatten(0, 1), options, cu_queries=cu_seqlens_q,
        first=first if leftpad is None else first + leftpad, end=end, return_lse=return_lse,
    )  # fmt: skip

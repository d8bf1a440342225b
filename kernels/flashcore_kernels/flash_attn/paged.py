"""Calls of FlashAttention's that our kernels for pages serve: nothing is gathered, and new tokens take one launch."""

import torch

from ..cache.paged import Pages
from ..choose import KERNEL_DTYPES, MAX_HEAD_DIM
from ..device import device_of
from ..problem import any_requires_grad
from .options import Options


def pages_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor,
    cu_queries: torch.Tensor,
    lengths: torch.Tensor,
    options: Options,
) -> Pages | None:
    """What `paged_attention` takes, or None where it does not serve such a call.

    Args:
        q: `[..., H, D]`.
        k, v: `[pages, page_size, Hkv, D]` and Dv.
        block_table: int `[B, blocks]`.
        cu_queries: int `[B + 1]`.
        lengths: int `[B]`, keys of each sequence.
    """
    plain = not options.chunk and not options.dropout and options.slopes is None and options.qv is None
    page_size = k.shape[1]
    sizes = (*q.shape, *k.shape, *v.shape, *block_table.shape)
    if not plain or 0 in sizes or page_size & (page_size - 1) or options.descales != (None, None, None):
        return None
    device = device_of(q.device)
    fp8 = k.dtype == torch.float8_e4m3fn
    served = q.dtype in KERNEL_DTYPES and max(q.shape[-1], v.shape[3]) <= MAX_HEAD_DIM and device.kind != "torch"
    if not served or (fp8 and device.kind == "cuda" and device.arch < 89) or k.stride(3) != 1 or v.stride(3) != 1:
        return None
    if torch.is_grad_enabled() and any_requires_grad(q, k, v):
        return None
    ones = torch.ones(k.shape[2], dtype=torch.float32, device=k.device) if fp8 else None
    table, cu_queries, lengths = (t.to(torch.int32).contiguous() for t in (block_table, cu_queries, lengths))
    return Pages(k, v, table, cu_queries, lengths, key_scale=ones, value_scale=ones)


def rows_as_pages(cache: torch.Tensor) -> torch.Tensor | None:
    """Rows `[rows, S, Hkv, D]` as pages `[rows * n, S / n, Hkv, D]` of a power of two; None where they are none.

    Pages of at least 16 tokens, or it would be a table of single tokens.
    """
    rows, length = cache.shape[:2]
    page_size = min(length & -length, 1024)
    if page_size < 16 or cache.stride(0) != length * cache.stride(1):
        return None
    return cache.as_strided(
        (rows * (length // page_size), page_size, *cache.shape[2:]),
        (page_size * cache.stride(1), *cache.stride()[1:]),
        cache.storage_offset(),
    )

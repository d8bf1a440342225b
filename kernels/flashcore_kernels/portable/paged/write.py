"""New keys and values into their pages."""

import torch
import triton
import triton.language as tl

from ...plan import power_of_2_from
from ...runtime.launch import launch
from ..kv_write_kernel import BLOCK_TOKENS
from .kernel import keys_of


@triton.jit
def store_rows(Pages, rows, states, valid, offs, scale, SIZE: tl.constexpr):
    """[S, D] new tokens into the rows at `rows` [S], divided by `scale` where the pages are e4m3."""
    if Pages.dtype.element_ty == tl.float8e4nv:
        # `/` may be off by an ulp on a GPU, and so store another number than PyTorch's division.
        states = tl.div_rn(states.to(tl.float32), scale + tl.zeros(states.shape, tl.float32))
        # Comparisons leave NaN as it is.
        states = tl.where(states > 448.0, 448.0, tl.where(states < -448.0, -448.0, states))
    keep = valid[:, None] & (offs < SIZE)[None, :]
    tl.store(Pages + rows[:, None] + offs[None, :], states.to(Pages.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "table_width", "num_pages", "steps"])
def flashcore_write_pages(
    Key,
    Value,
    KeyPages,
    ValuePages,
    Table,
    CuQ,
    Lengths,
    KeyScale,
    ValueScale,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_kp,
    stride_ks,
    stride_kph,
    stride_vp,
    stride_vs,
    stride_vph,
    stride_table,
    num_kv_heads,
    num_tokens,
    num_sequences,
    table_width,
    num_pages,
    steps,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    RING: tl.constexpr,
    CUMULATIVE: tl.constexpr,
):
    """pages[table[s, p // page_size], p % page_size] = new[cu_q[s] + i], p being the place of token i in sequence s.

    The new tokens are a sequence's last keys. In a ring p is taken modulo RING, and of more new tokens than it has
    slots the last ones are kept. Padding, sequences without keys, and entries of -1 are left out.

    Shapes: as `flashcore_paged`, with the new tokens `[T, Hkv, D]`. Grid: `(cdiv(T, BLOCK_T) * Hkv,)`.
    """
    pid = tl.program_id(0)
    head = (pid % num_kv_heads).to(tl.int64)
    t = pid // num_kv_heads * BLOCK_T + tl.arange(0, BLOCK_T)  # [S]
    # The last sequence that begins at or before the token: 2 ** steps is more than there are.
    s = t * 0
    high = s + num_sequences
    for _ in range(steps):
        middle = (s + high + 1) // 2
        begins = tl.load(CuQ + middle) <= t
        s = tl.where(begins, middle, s)
        high = tl.where(begins, high, middle - 1)
    valid = (s < num_sequences) & (t < num_tokens)
    s = tl.minimum(s, num_sequences - 1)
    length = keys_of(Lengths, s, CUMULATIVE)
    place = length - tl.load(CuQ + s + 1) + t
    valid = valid & (place >= 0) & (length > 0)
    slot = tl.maximum(place, 0)
    if RING > 0:
        valid = valid & (place >= length - RING)
        slot = slot % RING
    entry = slot // PAGE_SIZE
    valid = valid & (entry < table_width)
    page = tl.load(Table + s.to(tl.int64) * stride_table + entry, mask=valid, other=-1)
    valid = valid & (page >= 0) & (page < num_pages)
    page = page.to(tl.int64)
    inside = (slot % PAGE_SIZE).to(tl.int64)
    key_scale = 1.0
    value_scale = 1.0
    if KeyScale is not None:
        key_scale = tl.load(KeyScale + head)
        value_scale = tl.load(ValueScale + head)

    offs_d = tl.arange(0, BLOCK_D)
    rows = Key + t.to(tl.int64) * stride_kt + head * stride_kh
    key = tl.load(rows[:, None] + offs_d[None, :], mask=valid[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    at = page * stride_kp + inside * stride_ks + head * stride_kph
    store_rows(KeyPages, at, key, valid, offs_d, key_scale, HEAD_DIM)
    offs_v = tl.arange(0, BLOCK_DV)
    rows = Value + t.to(tl.int64) * stride_vt + head * stride_vh
    value = tl.load(rows[:, None] + offs_v[None, :], mask=valid[:, None] & (offs_v < VALUE_DIM)[None, :], other=0.0)
    at = page * stride_vp + inside * stride_vs + head * stride_vph
    store_rows(ValuePages, at, value, valid, offs_v, value_scale, VALUE_DIM)


def run_write_pages(
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    key_lengths: torch.Tensor,
    ring: int,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
) -> None:
    """Launch `flashcore_write_pages` on the current stream of key's device."""
    num_tokens, num_kv_heads, head_dim = key.shape
    value_dim, num_sequences = value.shape[2], block_table.shape[0]
    block = 1 if num_tokens == 1 else BLOCK_TOKENS
    launch(
        flashcore_write_pages,
        triton.cdiv(num_tokens, block) * num_kv_heads,
        (
            key, value, key_pages, value_pages, block_table, cu_seqlens_q, key_lengths, key_scale, value_scale,
            *key.stride()[:2], *value.stride()[:2], *key_pages.stride()[:3], *value_pages.stride()[:3],
            block_table.stride(0), num_kv_heads,
        ),
        (num_tokens, num_sequences, block_table.shape[1], key_pages.shape[0], num_sequences.bit_length()),
        (
            head_dim, value_dim, power_of_2_from(head_dim), power_of_2_from(value_dim), block, key_pages.shape[1], ring,
            key_lengths.shape[0] == num_sequences + 1,
        ),
    )  # fmt: skip

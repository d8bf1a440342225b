"""Where a key lies: from its place in a sequence to its row in the pages, or among the new tokens."""

import triton
import triton.language as tl

from ..blocks import attend_block


@triton.jit
def page_of(table, slots, table_width, num_pages, mask, MASKED: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """The pages that hold a sequence's `slots`, by its line of the block table."""
    # Clamped, so that wrong lengths or a wrong table can show wrong keys but never make a program read outside.
    at = tl.minimum(slots // PAGE_SIZE, table_width - 1)
    if MASKED:
        page = tl.load(table + at, mask=mask, other=0)
    else:
        page = tl.load(table + at)
    return tl.minimum(tl.maximum(page, 0), num_pages - 1).to(tl.int64)


@triton.jit
def attend_pages(
    q,  # as attend_block
    acc,
    m,
    l,
    K,
    V,  # the pool, at this KV head
    NewK,
    NewV,  # this sequence's first new token, at this KV head
    table,  # this sequence's line of the block table
    table_width,
    num_pages,
    past,  # keys before it are in the pool, where NEW; key past + i is new token i's, for any sign of past
    stride_kp,
    stride_ks,
    stride_vp,
    stride_vs,
    stride_nk,
    stride_nv,
    n,
    lo,
    hi,
    row_lo,
    row_hi,
    row_valid,
    score_scale,
    cap_scale,
    one,
    edge,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    RING: tl.constexpr,  # slots that a sequence has, over and over; 0: one for each key
    WHOLE: tl.constexpr,  # no block of keys lies on two pages, and none is at the end of the ring and its beginning
    NEW: tl.constexpr,
    EXACT: tl.constexpr,
    CHECK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """`attend_block` of keys [n, n + BLOCK_N) of a sequence, wherever they are: returns its new (acc, m, l)."""
    if WHOLE:
        slot = n % RING if RING > 0 else n
        page = page_of(table, slot, table_width, num_pages, None, False, PAGE_SIZE)
        # attend_block counts rows from the sequence's first key.
        rows = (slot % PAGE_SIZE - n).to(tl.int64)
        keys = K + page * stride_kp + rows * stride_ks
        values = V + page * stride_vp + rows * stride_vs
        key_step = stride_ks
        value_step = stride_vs
    else:
        cols = n + tl.arange(0, BLOCK_N)  # [N]
        there = (cols >= lo) & (cols < hi)
        stored = there
        if NEW:
            stored = there & (cols < past)
        slot = cols % RING if RING > 0 else cols
        page = page_of(table, slot, table_width, num_pages, stored, True, PAGE_SIZE)  # [N]
        row = (slot % PAGE_SIZE).to(tl.int64)
        # A pointer to each row: attend_block adds nothing but columns.
        keys = (K + page * stride_kp + row * stride_ks)[:, None]  # [N, 1]
        values = (V + page * stride_vp + row * stride_vs)[:, None]  # [N, 1]
        if NEW:
            new = (cols - past).to(tl.int64)
            keys = tl.where((cols < past)[:, None], keys, (NewK + new * stride_nk)[:, None])
            values = tl.where((cols < past)[:, None], values, (NewV + new * stride_nv)[:, None])
        key_step = 0
        value_step = 0
    acc, acc1, m, l = attend_block(
        q, q, acc, 0.0, m, l, keys, values, key_step, value_step, n, lo, hi, row_lo, row_hi, table, 0, row_lo,
        row_valid, 0, score_scale, cap_scale, one, edge, None, None, 0, 0, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, 0, 0,
        BLOCK_N, EXACT, CHECK, False, 0, False, SOFTCAP,
    )  # fmt: skip
    return acc, m, l

"""With a key range for each query: which queries see a block of keys, found once a call, on the device."""

import triton
import triton.language as tl

# Blocks of queries that a program looks at at once for those that see its keys.
SCAN = 256


@triton.jit(do_not_specialize=["num_queries", "num_keys", "stride_rb", "stride_rs"])
def flashcore_hopper_backward_blocks(Range, Blocks, num_queries, num_keys, stride_rb, stride_rs, BLOCK_M: tl.constexpr):
    """Of each block of BLOCK_M queries (lo, hi, all_lo, all_hi, blind).

    Some of its queries see keys in [lo, hi) and none others; those that see any see all of [all_lo, all_hi); `blind`
    says whether there is one that sees none.

    Shapes: Range a KeyRange with a line a query; Blocks int32 `[B, 5, cdiv(Q, BLOCK_M)]`.
    Grid: (cdiv(Q, BLOCK_M), B).
    """
    b = tl.program_id(1).to(tl.int64)
    num_blocks = tl.num_programs(0)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = m < num_queries
    line = Range + b * stride_rb + m.to(tl.int64) * stride_rs
    # Clamped, so that a wrong KeyRange can hide keys but never read outside of the tensors.
    lo = tl.maximum(tl.load(line, mask=there, other=0), 0)
    hi = tl.minimum(tl.load(line + 1, mask=there, other=0), num_keys)
    sees = there & (lo < hi)
    out = Blocks + b * 5 * num_blocks + tl.program_id(0)
    tl.store(out, tl.min(tl.where(sees, lo, num_keys), axis=0))
    tl.store(out + num_blocks, tl.max(tl.where(sees, hi, 0), axis=0))
    tl.store(out + 2 * num_blocks, tl.max(tl.where(sees, lo, 0), axis=0))
    tl.store(out + 3 * num_blocks, tl.min(tl.where(sees, hi, num_keys), axis=0))
    tl.store(out + 4 * num_blocks, tl.max((there & (lo >= hi)).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["num_blocks", "num_queries", "num_keys", "stride_rb", "stride_rs"])
def flashcore_hopper_backward_spans(
    Range, Blocks, Spans, num_blocks, num_queries, num_keys, stride_rb, stride_rs, BLOCK_M: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """Of each 64 keys (begin, end, whole_begin, whole_end, seen, seen, blind).

    The blocks of queries [begin, end) hold all that see some of these keys; where none does, end is 0. In those of
    [whole_begin, whole_end) each query sees all of them, or no key at all. Bit k % 32 of word k / 32 of `seen` is 0
    where a query could see key k and none does.
    `blind` says whether a block of [begin, end) may hold a query that sees no key at all.

    Whole blocks are one run, and documents have no second one. What else might be whole is masked to no effect.

    Shapes: Range, Blocks as in `flashcore_hopper_backward_blocks`; Spans int32 `[B, spans, 8]`.
    Grid: (spans, B).
    """
    b = tl.program_id(1).to(tl.int64)
    k0 = tl.program_id(0) * 64
    behind = tl.minimum(k0 + 64, num_keys)
    Blocks += b * 5 * num_blocks
    begin = num_blocks
    end = num_blocks * 0
    whole_begin = num_blocks
    whole_end = num_blocks
    blind_from = num_blocks
    blind_to = num_blocks * 0
    for at in range(0, num_blocks, SCAN):
        i = at + tl.arange(0, SCAN)
        there = i < num_blocks
        lo = tl.load(Blocks + i, mask=there, other=0)
        hi = tl.load(Blocks + num_blocks + i, mask=there, other=0)
        all_lo = tl.load(Blocks + 2 * num_blocks + i, mask=there, other=0)
        all_hi = tl.load(Blocks + 3 * num_blocks + i, mask=there, other=0)
        blind = tl.load(Blocks + 4 * num_blocks + i, mask=there, other=0) != 0
        some = there & (lo < behind) & (hi > k0)
        begin = tl.minimum(begin, tl.min(tl.where(some, i, num_blocks), axis=0))
        end = tl.maximum(end, tl.max(tl.where(some, i + 1, 0), axis=0))
        whole = some & (all_lo <= k0) & (all_hi >= behind)
        whole_begin = tl.minimum(whole_begin, tl.min(tl.where(whole, i, num_blocks), axis=0))
        stop = there & (whole == 0) & (i > whole_begin)
        whole_end = tl.minimum(whole_end, tl.min(tl.where(stop, i, num_blocks), axis=0))
        blind_from = tl.minimum(blind_from, tl.min(tl.where(blind, i, num_blocks), axis=0))
        blind_to = tl.maximum(blind_to, tl.max(tl.where(blind, i + 1, 0), axis=0))
    keys = k0 + tl.arange(0, 64)  # [64]
    seen = (keys < behind) & (whole_begin < num_blocks)
    if whole_begin == num_blocks:
        for i in range(begin, end):
            m = i * BLOCK_M + tl.arange(0, BLOCK_M)
            line = Range + b * stride_rb + m.to(tl.int64) * stride_rs
            lo = tl.load(line, mask=m < num_queries, other=0)  # [BLOCK_M]
            hi = tl.load(line + 1, mask=m < num_queries, other=0)
            sees = (keys[:, None] >= lo[None, :]) & (keys[:, None] < hi[None, :]) & (keys < behind)[:, None]
            seen = seen | (tl.max(sees.to(tl.int32), axis=1) != 0)
    # Each bit occurs once, so that the sum is an OR; bit 31 is the sign.
    bits = tl.where(seen | (keys >= num_keys), tl.full([64], 1, tl.int32) << (keys & 31), 0)
    out = Spans + (b * tl.num_programs(0) + tl.program_id(0)) * 8
    tl.store(out, begin)
    tl.store(out + 1, end)
    tl.store(out + 2, whole_begin)
    tl.store(out + 3, whole_end)
    tl.store(out + 4, tl.sum(tl.where(keys < k0 + 32, bits, 0), axis=0))
    tl.store(out + 5, tl.sum(tl.where(keys >= k0 + 32, bits, 0), axis=0))
    tl.store(out + 6, ((blind_from < end) & (blind_to > begin)).to(tl.int32))

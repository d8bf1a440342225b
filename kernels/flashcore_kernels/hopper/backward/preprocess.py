"""Two numbers of each query that both backward kernels start from, and two words: bound by memory, so plain Triton."""

import triton
import triton.language as tl

from ...dropout import dropout_keys
from ..visible import BITMAP, END, FIRST, HOLES, LEFT, QUERY_START, RIGHT


@triton.jit
def _shift(Range, b, query_start, stride_rb, BLOCK_M: tl.constexpr, RANGE: tl.constexpr):
    """Query m is at place m + this, see masks.py."""
    first = query_start * 0
    if RANGE == 1:
        first = tl.maximum(tl.load(Range + b * stride_rb + FIRST), 0)
        query_start = tl.load(Range + b * stride_rb + QUERY_START)
    return (BLOCK_M - tl.maximum(first - query_start, 0) % BLOCK_M) % BLOCK_M


@triton.jit
def _are_blind(Range, b, m, num_queries, num_keys, query_start, left, right, stride_rb, stride_rs, RANGE: tl.constexpr):
    """Which of the queries `m` see no key. Where there are sinks, lse does not say so."""
    if RANGE == 2:
        line = Range + b * stride_rb
        there = (m >= 0) & (m < num_queries)
        lo = tl.load(line + m * stride_rs, mask=there, other=0)
        hi = tl.load(line + m * stride_rs + 1, mask=there, other=0)
        return tl.maximum(lo, 0) >= tl.minimum(hi, num_keys)
    first = query_start * 0
    end = num_keys
    if RANGE == 1:
        line = Range + b * stride_rb
        first = tl.maximum(tl.load(line + FIRST), 0)
        end = tl.minimum(tl.load(line + END), num_keys)
        query_start = tl.load(line + QUERY_START)
        left = tl.load(line + LEFT)
        right = tl.load(line + RIGHT)
    lo = tl.where(left < 0, first, tl.maximum(first, query_start + m - left))
    hi = tl.where(right < 0, end, tl.minimum(end, query_start + m + right + 1))
    blind = lo >= hi
    if RANGE == 1:
        if tl.load(line + HOLES) != 0:
            blind = m == m
            for word in range(first // 32, tl.cdiv(end, 32)):
                exist = tl.load(line + BITMAP + word).to(tl.int64)
                # The bits of the word's keys in [lo, hi).
                one = tl.full(m.shape, 1, tl.int64)
                from_lo = (one << 32) - (one << tl.minimum(tl.maximum(lo - 32 * word, 0), 32))
                to_hi = (one << tl.minimum(tl.maximum(hi - 32 * word, 0), 32)) - 1
                blind = blind & ((exist & from_lo & to_hi) == 0)
    return blind


_NOT_SPECIALIZED = [
    "stride_ob", "stride_oh", "stride_os", "stride_gb", "stride_gh", "stride_gs", "num_heads", "num_queries",
    "num_keys", "query_start", "window_left", "window_right", "stride_rb", "stride_rs",
]  # fmt: skip


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def flashcore_hopper_backward_rows(
    Out,
    GradOut,
    Lse,
    GradLse,
    Range,
    Philox,
    Rows,
    places,
    of_delta,
    value_dim,
    stride_ob,
    stride_oh,
    stride_os,
    stride_gb,
    stride_gh,
    stride_gs,
    num_heads,
    num_queries,
    num_keys,
    query_start,
    window_left,
    window_right,
    stride_rb,
    stride_rs,
    lse_factor,
    delta_factor,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    RANGE: tl.constexpr,
    SINKS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Rows[0] = lse_factor * lse, -inf where a row saw no key; Rows[1] = dLse - rowsum(dO * O), dLse alone of such.

    With dropout, Rows[1] times delta_factor, and Rows[2] and Rows[3] the bits of `dropout_keys`. There dS = P * (dP *
    keep / (1 - dropout) - delta), and the kernels make 2 (1 - dropout) times that.

    Shapes: Out, GradOut `[B, H, Q, Dv]`, their strides in units of 8 elements; Lse, and GradLse where there is one,
    `[B, H, Q]` fp32, dense; Philox int64 `[2]`, or None without dropout; Rows `[2 or 4, B * H, places]` fp32,
    `of_delta` elements apart: query m is at place m + shift (see masks.py), for blocks of BLOCK_M queries. At places
    without a query there are -inf and 0, which make P and dS zero. lse_factor is negative.
    Grid: (B * H * places / PLACES).

    A row is added up by threads in an order that follows from what Triton knows of the strides. It must be one for all
    calls, or a sequence's bits would differ alone and batched.
    """
    h = tl.program_id(0) % num_heads
    pieces = places // PLACES
    place = tl.program_id(0) // num_heads % pieces * PLACES + tl.arange(0, PLACES)
    b = (tl.program_id(0) // num_heads // pieces).to(tl.int64)
    bh = b * num_heads + h
    m = place - _shift(Range, b, query_start, stride_rb, BLOCK_M, RANGE)
    there = (m >= 0) & (m < num_queries)
    d = tl.arange(0, BLOCK_DV)
    mask = there[:, None] & (d < value_dim)[None, :]
    rows = m.to(tl.int64)[:, None]
    out = Out + b * stride_ob * 8 + h.to(tl.int64) * stride_oh * 8 + rows * stride_os * 8 + d[None, :]
    out = tl.load(out, mask=mask, other=0.0).to(tl.float32)  # [PLACES, BLOCK_DV]
    grad = GradOut + b * stride_gb * 8 + h.to(tl.int64) * stride_gh * 8 + rows * stride_gs * 8 + d[None, :]
    grad = tl.load(grad, mask=mask, other=0.0).to(tl.float32)  # [PLACES, BLOCK_DV]
    delta = -tl.sum(out * grad, axis=1)
    lse = tl.load(Lse + bh * num_queries + m, mask=there, other=float("-inf"))
    if GradLse is not None:
        delta += tl.load(GradLse + bh * num_queries + m, mask=there, other=0.0)
    empty = lse == float("-inf")
    # What a row that saw no key passes on is nobody's: it may be NaN.
    delta = tl.where(empty, 0.0, delta)
    if SINKS:
        blind = _are_blind(
            Range, b, m, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rs, RANGE
        )
        # But through its lse it has a share in the sink's gradient.
        of_lse = tl.zeros_like(delta)
        if GradLse is not None:
            of_lse = tl.load(GradLse + bh * num_queries + m, mask=there, other=0.0)
        delta = tl.where(blind & (empty == 0), of_lse, delta)
        empty = empty | blind
    to = Rows + bh * places + place
    tl.store(to, tl.where(empty, float("-inf"), lse * lse_factor))
    if Philox is not None:
        row_0, row_1 = dropout_keys(Philox, bh.to(tl.int32), m)
        # One by one: a multiple of it may be more than an int32 holds.
        tl.store(to + of_delta + of_delta, row_0.to(tl.float32, bitcast=True))
        tl.store(to + of_delta + of_delta + of_delta, row_1.to(tl.float32, bitcast=True))
        delta *= delta_factor
    tl.store(to + of_delta, delta)

"""What the backward's kernels share: which keys rows see, and a tile's probabilities once more from the log-sum-exp.

Names as in blocks.py: M queries and N keys of a tile, scores in units of log2 (natural ones in fp32). A row's bits must
not depend on whether its tile was checked for visibility, so what a compiler could contract in one loop alone is an
explicit fma.
"""

import triton
import triton.language as tl

from .blocks import power_of_2, tanh

LOG2_E = tl.constexpr(1.4426950408889634)
# Triton takes the integers for their values where they are 1 or multiples of 16; lengths would compile anew.
NUMBERS = ["num_queries", "num_keys", "query_start", "window_left", "window_right", "drop_below"]


@triton.jit
def row_ranges(
    Range, stride_rb, stride_rs, b, m, num_queries, num_keys, first, end, start, left, right, RANGE: tl.constexpr
):
    """(lo, hi) [M]: queries `m` see keys [lo, hi); nothing, (0, 0), where there is no such query."""
    valid = (m >= 0) & (m < num_queries)
    if RANGE == 2:
        line = Range + b * stride_rb + m * stride_rs
        lo = tl.maximum(tl.load(line, mask=valid, other=0), 0)
        hi = tl.minimum(tl.load(line + 1, mask=valid, other=0), num_keys)
    else:
        lo = tl.maximum(first, start + m - left)
        hi = tl.minimum(end, start + m + right + 1)
    return tl.where(valid, lo, 0), tl.where(valid, hi, 0)


@triton.jit
def load_lse(Lse, m, there, AS_IS: tl.constexpr):
    """[M] fp32 log-sum-exp, +inf where a row sees no key: its probabilities then are 0, not NaN.

    In units of log2, but AS_IS in fp32, where another rounding of it would be one of each probability, and where
    `flashcore_backward_shift` prepared it.
    """
    lse = tl.load(Lse + m, mask=there, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse if AS_IS else lse * LOG2_E)


@triton.jit
def load_mask(at, there, MASK: tl.constexpr, EXACT: tl.constexpr):
    """(bias, whether the mask lets through) of the tile at the pointers `at`; the bias in the units of the lse."""
    value = tl.load(at, mask=there, other=0)
    if MASK == 1:
        return 0.0, there & (value != 0)
    else:
        value = value.to(tl.float32)
        # As in the forward: finite stays finite.
        return tl.maximum(value if EXACT else value * LOG2_E, -3.0e38), there & (value > float("-inf"))


@triton.jit
def probabilities(s, lse, bias, score_scale, cap_scale, SOFTCAP: tl.constexpr, MASK: tl.constexpr,
                  FOLD: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """(exp(score - lse), tanh of the score over the cap), of products `s` of queries and keys.

    `lse` comes from `load_lse` and broadcasts with `s`; with FOLD the products began at -lse / score_scale instead.
    """
    t = s
    if SOFTCAP:
        t = tanh(s * score_scale, EXACT)
    if FOLD:
        x = s * score_scale
    else:
        lse = tl.broadcast_to(lse, s.shape)
        unit = tl.zeros_like(s) + (cap_scale if SOFTCAP else score_scale)
        if MASK == 2:
            x = tl.fma(t, unit, bias) - lse
        else:
            x = tl.fma(t, unit, -lse)
    if EXACT:
        x *= LOG2_E
    return power_of_2(x, EXACT), t


@triton.jit
def accumulated(a, b, acc, one, EXACT: tl.constexpr):
    """acc + a b. In fp32 the tile's product is a sum of its own: a long sum of single products would lose more."""
    if EXACT:
        part = tl.dot(a, b, input_precision="ieee")
        # As a plain addition it would become the start of the dot.
        return tl.fma(part, one + tl.zeros_like(part), acc)
    return tl.dot(a, b, acc)

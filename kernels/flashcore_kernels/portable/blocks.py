"""What the Triton kernels share: one block of keys under an online softmax, and the question which keys a row sees.

Names: M rows (queries) and N keys in a block, D and DV the head dimensions padded to powers of two. Scores are kept in
units of log2, so that exp2 serves; `score_scale` and `cap_scale` fold log2(e) in (see `Problem.score_factors`).

A row's bits must not depend on whether its block was checked for visibility or not, since that depends on the tile it
is in. So whatever a compiler could contract in one of the two loops and not in the other is an explicit fma in both.
"""

import torch
import triton
import triton.language as tl

from ..dropout import dropout_keep

# Words of a KeyRange line; key_range.py owns the layout, tests compare the two.
FIRST = tl.constexpr(0)
END = tl.constexpr(1)
QUERY_START = tl.constexpr(2)
LEFT = tl.constexpr(3)
RIGHT = tl.constexpr(4)
HOLES = tl.constexpr(5)
BITMAP = tl.constexpr(6)

# Further than any two keys are apart, and small enough that sums of two stay in int32.
FAR = tl.constexpr(1 << 29)
# Scores from here on are so coarse that another rounding of them does not count.
FAR_SCORE = tl.constexpr(1048576.0)


def mask_strides(mask: torch.Tensor | None) -> tuple[int, ...]:
    """Strides of a dense mask over `[B, H, Q, K]`, 0 where it is broadcast."""
    if mask is None:
        return 0, 0, 0, 0
    return tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))


def mask_number(kind: str | None, shared: bool) -> int:
    """The kernels' `MASK`: 0 without a mask, 1 bool, 2 float; 3 and 4 where all rows of a tile share one row of it."""
    return 0 if kind is None else ("bool", "float").index(kind) + (3 if shared else 1)


@triton.jit
def sequence_bounds(Range, stride_rb, b, num_keys, query_start, window_left, window_right, HAS_RANGE: tl.constexpr):
    """One sequence's (first, end, slot of query 0, left, right, holes), from its KeyRange line or the arguments."""
    if HAS_RANGE:
        line = Range + b * stride_rb
        # Clamped, so that a wrong KeyRange can hide keys but never read outside of the tensors.
        first = tl.maximum(tl.load(line + FIRST), 0)
        end = tl.minimum(tl.load(line + END), num_keys)
        start = tl.load(line + QUERY_START)
        left = tl.load(line + LEFT)
        right = tl.load(line + RIGHT)
        holes = tl.load(line + HOLES)
    else:
        first = 0
        end = num_keys
        start = query_start
        left = window_left
        right = window_right
        holes = 0
    left = tl.where(left < 0, FAR, tl.minimum(left, FAR))
    right = tl.where(right < 0, FAR, tl.minimum(right, FAR))
    return first, end, start, left, right, holes


@triton.jit
def load_tile(base, offs_s, stride_s, offs_d, mask_s, SIZE_D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """[S, D] tile at `base`; rows outside of `mask_s` (looked at only where CHECK) and padding columns are 0."""
    ptrs = base + offs_s.to(tl.int64)[:, None] * stride_s + offs_d[None, :]
    if SIZE_D == BLOCK_D:
        if CHECK:
            return tl.load(ptrs, mask=mask_s[:, None], other=0.0)
        return tl.load(ptrs)
    columns = offs_d[None, :] < SIZE_D
    if CHECK:
        return tl.load(ptrs, mask=mask_s[:, None] & columns, other=0.0)
    return tl.load(ptrs, mask=columns, other=0.0)


@triton.jit
def power_of_2(x, EXACT: tl.constexpr):
    """2 ** x; EXACT: to about one rounding of fp32, where the instruction is off by two."""
    if not EXACT:
        return tl.exp2(x)
    near = tl.minimum(tl.maximum(x, -127.0), 127.0)
    whole = tl.floor(near + 0.5)
    f = near - whole
    # Taylor to f^7; at |f| = 0.5 the next term is a tenth of a rounding.
    p = tl.full(x.shape, 1.5252733804059841e-5, tl.float32)
    p = tl.fma(f, p, tl.full(x.shape, 1.5403530393381606e-4, tl.float32))
    p = tl.fma(f, p, tl.full(x.shape, 1.3333558146428443e-3, tl.float32))
    p = tl.fma(f, p, tl.full(x.shape, 9.618129107628477e-3, tl.float32))
    p = tl.fma(f, p, tl.full(x.shape, 5.550410866482158e-2, tl.float32))
    p = tl.fma(f, p, tl.full(x.shape, 2.402265069591007e-1, tl.float32))
    p = tl.fma(f, p, tl.full(x.shape, 6.931471805599453e-1, tl.float32))
    p = tl.fma(f, p, tl.full(x.shape, 1.0, tl.float32))
    p *= ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    # Below 2 ** -126 the instruction gives 0 too. NaN stays NaN.
    return tl.where(x < -126.0, 0.0, tl.where(x == x, p, x))


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """tanh, exact to fp32 rounding, or with a relative error below 4e-6, which 16-bit inputs hide: a third the work."""
    x2 = x * x
    if EXACT:
        t = tl.exp2(-2.8853900817779268 * tl.abs(x))  # exp(-2|x|)
        far = (1.0 - t) / (1.0 + t)
        far = tl.where(x < 0, -far, far)
        # 1 - exp(-2|x|) cancels near 0. There Taylor's series, to x^11: at |x| = 0.3 the next term is below rounding.
        near = -0.008863235529902197
        near = near * x2 + 0.021869488536155203
        near = near * x2 - 0.05396825396825397
        near = near * x2 + 0.13333333333333333
        near = near * x2 - 0.3333333333333333
        return tl.where(tl.abs(x) < 0.3, x + x * x2 * near, far)
    else:
        far = 1.0 - 2.0 / (1.0 + tl.exp2(2.8853900817779268 * x))
        near = x + x * x2 * (x2 * 0.13333333333333333 - 0.3333333333333333)
        return tl.where(tl.abs(x) < 0.0625, near, far)


@triton.jit
def short_sums(
    q_rows, K, stride_ks, cols, present, row_valid, one, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """[M, N] fp32 q k^T, IEEE products, summed over 16 elements of head_dim at a time.

    tl.dot adds one product after another to one sum; over 192 of them that loses twice what PyTorch's tiles lose.
    """
    CHUNK: tl.constexpr = 16
    s = tl.zeros([q_rows.shape[0], cols.shape[0]], tl.float32)
    for c in tl.static_range(0, BLOCK_D, CHUNK):
        offs_d = c + tl.arange(0, CHUNK)
        q = tl.load(
            q_rows[:, None] + offs_d[None, :], mask=row_valid[:, None] & (offs_d[None, :] < HEAD_DIM), other=0.0
        )
        k = load_tile(K, cols, stride_ks, offs_d, present, HEAD_DIM, BLOCK_D, CHECK).to(tl.float32)  # [N, CHUNK]
        # fp32 means fp32: tl.dot would take tf32 by default.
        part = tl.dot(q, tl.trans(k), input_precision="ieee")
        # As a plain addition it would become the start of the dot, and one long sum again.
        s = tl.fma(part, one + tl.zeros_like(part), s)
    return s


@triton.jit
def seen(cols, present, row_lo, row_hi):
    """Which of the keys `cols` [N] that are `present` lie in the rows' ranges [row_lo, row_hi) [M]: [M, N]."""
    return present[None, :] & (cols[None, :] >= row_lo[:, None]) & (cols[None, :] < row_hi[:, None])


@triton.jit
def attend_block(
    q,  # [M, D]; where EXACT, [M] pointers to its rows
    q1,  # [M, D1], the columns behind them; anything where D1 is 0
    acc,  # [M, DV] fp32, unnormalised output
    acc1,  # [M, DV1] fp32, its columns behind those; anything where DV1 is 0
    m,  # [M] fp32, running maximum of the scores (log2 units)
    l,  # [M] fp32, running denominator
    K,
    V,  # of this sequence and KV head
    stride_ks,
    stride_vs,
    n,  # first key of the block
    lo,
    hi,  # keys [lo, hi) are the ones that some row sees
    row_lo,
    row_hi,  # [M] each row sees keys [row_lo, row_hi)
    bitmap,  # pointer to this sequence's bitmap
    holes,  # 0, or 1: read it
    bias_rows,  # [M] pointers to the rows of the dense mask; one pointer where MASK is 3 or 4
    bias_valid,  # [M] which of them may be read
    stride_mk,
    score_scale,
    cap_scale,
    one,  # 1.0, but not to the compiler
    edge,  # whether some row may not see some key of the block; read only where CHECK is 2
    drop_0,
    drop_1,  # [M] `dropout_keys` of the rows, or None
    first,  # key from which dropout counts
    drop_below,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_D1: tl.constexpr,  # where not 0, HEAD_DIM is BLOCK_D + BLOCK_D1
    BLOCK_DV1: tl.constexpr,  # where not 0, VALUE_DIM is BLOCK_DV + BLOCK_DV1
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,  # fp32: keep the sums short
    CHECK: tl.constexpr,  # 0: every row sees every key of the block; 1: look which; 2: look where `edge`
    HAS_RANGE: tl.constexpr,
    MASK: tl.constexpr,  # 0 none, 1 bool, 2 float; 3 and 4: bool and float, one row for all rows of the tile
    GAPS: tl.constexpr,  # keys in [lo, hi) may be seen by no row, and may then hold anything
    SOFTCAP: tl.constexpr,
):
    """Fold keys [n, n + BLOCK_N) into the online softmax state: returns its new (acc, acc1, m, l)."""
    cols = n + tl.arange(0, BLOCK_N)  # [N]
    # Both comparisons at once: what lies before lo is beyond hi - lo without a sign.
    present = (cols - lo).to(tl.uint32) < (hi - lo).to(tl.uint32)  # [N]
    rows = cols  # of K and V
    WHOLE: tl.constexpr = HEAD_DIM == BLOCK_D + BLOCK_D1 and VALUE_DIM == BLOCK_DV + BLOCK_DV1
    if CHECK != 1 and WHOLE:
        # Offsets that no block changes save instructions for registers. Checks need those, and so do rows that are
        # loaded element by element.
        rows = tl.arange(0, BLOCK_N)
        V += (n + tl.zeros([], tl.int64)) * stride_vs
        if not EXACT:
            K += (n + tl.zeros([], tl.int64)) * stride_ks
    if CHECK == 1 and HAS_RANGE:
        word = tl.load(bitmap + (cols >> 5), mask=present & (holes + cols * 0 != 0), other=-1)  # [N]
        present = present & (((word >> (cols & 31)) & 1) == 1)
    if CHECK == 1 and MASK >= 3:
        # What it hides is hidden from all rows, so it is never loaded.
        shared = tl.load(bias_rows + cols.to(tl.int64) * stride_mk, mask=present, other=0)  # [N]
        if MASK == 3:
            present = present & (shared != 0)
        else:
            shared = shared.to(tl.float32)
            present = present & (shared > float("-inf"))
    if EXACT:
        s = short_sums(q, K, stride_ks, cols, present, bias_valid, one, HEAD_DIM, BLOCK_D, CHECK)  # [M, N]
    else:
        SIZE_D: tl.constexpr = HEAD_DIM if BLOCK_D1 == 0 else BLOCK_D
        k = load_tile(K, rows, stride_ks, tl.arange(0, BLOCK_D), present, SIZE_D, BLOCK_D, CHECK)  # [N, D]
        s = tl.dot(q, tl.trans(k.to(q.dtype)))  # [M, N]
        if BLOCK_D1 != 0:
            offs_d1 = BLOCK_D + tl.arange(0, BLOCK_D1)
            k1 = load_tile(K, rows, stride_ks, offs_d1, present, BLOCK_D1, BLOCK_D1, CHECK)  # [N, D1]
            s = tl.dot(q1, tl.trans(k1.to(q1.dtype)), s)
    # s * unit are the scores in units of log2; multiplied out only with the maximum at hand, by one fma.
    unit = score_scale
    if SOFTCAP:
        s = tanh(s * unit, EXACT)
        unit = cap_scale
    if CHECK == 2:
        if edge:
            see = seen(cols, present, row_lo, row_hi)  # [M, N]
            s = tl.where(see, s, float("-inf"))
    elif CHECK == 1:
        see = seen(cols, present, row_lo, row_hi)  # [M, N]
        if MASK == 4:
            s = s * unit + tl.maximum(shared * 1.4426950408889634, -3.0e38)[None, :]
            unit = 1.0
        elif MASK == 1 or MASK == 2:
            at = bias_rows[:, None] + cols.to(tl.int64)[None, :] * stride_mk
            bias = tl.load(at, mask=bias_valid[:, None] & present[None, :], other=0)  # [M, N]
            if MASK == 1:
                see = see & (bias != 0)
            else:
                bias = bias.to(tl.float32)
                see = see & (bias > float("-inf"))
                # finfo.min * log2(e) would overflow to -inf; finite stays finite.
                s = s * unit + tl.maximum(bias * 1.4426950408889634, -3.0e38)
                unit = 1.0
        s = tl.where(see, s, float("-inf"))
        if GAPS:
            # V may hold NaN where no row looks, and 0 * NaN is NaN. Rows past the last one do not count as looking.
            present = present & (tl.max((see & bias_valid[:, None]).to(tl.int32), axis=0) > 0)
    SIZE_DV: tl.constexpr = VALUE_DIM if BLOCK_DV1 == 0 else BLOCK_DV
    v = load_tile(V, rows, stride_vs, tl.arange(0, BLOCK_DV), present, SIZE_DV, BLOCK_DV, CHECK)  # [N, DV]

    m_new = tl.maximum(m, tl.max(s, axis=1) * unit)  # [M]
    # A row that has seen no key yet has m = -inf, and -inf - -inf is NaN.
    m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    x = tl.fma(s, unit + tl.zeros_like(s), tl.zeros_like(s) - m_finite[:, None])  # [M, N]
    if EXACT:
        # From 2 ** 31 on what m lost by rounding over- or underflows the exponential. There, products rounded as m was.
        rounded = tl.fma(s * unit, one + tl.zeros_like(s), tl.zeros_like(s) - m_finite[:, None])
        x = tl.where((tl.abs(m_finite) > FAR_SCORE)[:, None], rounded, x)
    p = power_of_2(x, EXACT)  # [M, N]
    alpha = power_of_2(m - m_finite, EXACT)  # [M]
    l = l * alpha + tl.sum(p, axis=1)
    if drop_0 is not None:
        p = tl.where(dropout_keep(drop_0[:, None], drop_1[:, None], (cols - first)[None, :], drop_below), p, 0.0)
    if EXACT:
        # An fma here too, for the same reason as in short_sums.
        pv = tl.dot(p, v.to(tl.float32), input_precision="ieee")  # [M, DV]
        acc = tl.fma(acc, tl.broadcast_to(alpha[:, None], acc.shape), pv)
    else:
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * alpha[:, None])
        if BLOCK_DV1 != 0:
            offs_dv1 = BLOCK_DV + tl.arange(0, BLOCK_DV1)
            v1 = load_tile(V, rows, stride_vs, offs_dv1, present, BLOCK_DV1, BLOCK_DV1, CHECK)  # [N, DV1]
            acc1 = tl.dot(p.to(q.dtype), v1.to(q.dtype), acc1 * alpha[:, None])
    return acc, acc1, m_new, l


@triton.jit
def finish_rows(m, l, Sinks, head, head_valid, HAS_SINKS: tl.constexpr, EXACT: tl.constexpr):
    """(weight [M] and l [M] for `normalised`, the natural-log lse [M]); rows that saw no key give 0."""
    weight = tl.full(m.shape, 1.0, tl.float32)
    if HAS_SINKS:
        sink = tl.load(Sinks + head, mask=head_valid, other=0.0).to(tl.float32) * 1.4426950408889634
        m_new = tl.maximum(m, sink)
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = power_of_2(m - m_finite, EXACT)
        l = l * weight + power_of_2(sink - m_finite, EXACT)
        m = m_new
    # Not l > 0: a NaN in the inputs must stay one.
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    lse = tl.where(empty, float("-inf"), (m + tl.log2(l)) * 0.6931471805599453)
    return weight, l, lse


@triton.jit
def normalised(acc, weight, l, EXACT: tl.constexpr):
    """acc [M, D] * weight / l, the output."""
    if EXACT:
        # The plain division is off by up to two roundings.
        return tl.div_rn(acc * weight[:, None], tl.broadcast_to(l[:, None], acc.shape))
    # A division for each element takes longer than a whole block of keys, and 16 bits do not show the difference.
    return acc * (weight / l)[:, None]

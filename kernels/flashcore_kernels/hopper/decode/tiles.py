"""What the Hopper decode does with a tile: bring it to shared memory, widen e4m3, hide keys, fold scores into sums."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..rows import tanh
from ..triton_api import copy_async
from .fp8 import column_of


@gluon.jit
def copy_keys(smem, base, stride, n, n_end, bitmap, holes, C: gl.constexpr, SIZE: gl.constexpr, STEP: gl.constexpr):
    """Start copying keys [n, n + BN) of K or V at `base` to `smem`; zeros from the end on, and where nothing exists.

    The addresses are made in three dimensions, whose first has all its places in the same thread: so they are one
    register and constants.
    """
    BN: gl.constexpr = smem.shape[0]
    BLOCK: gl.constexpr = smem.shape[1]
    VEC: gl.constexpr = 128 // smem.dtype.primitive_bitwidth
    LANES: gl.constexpr = BLOCK // VEC if BLOCK // VEC < 32 else 32
    KEYS: gl.constexpr = 128 // LANES  # that all threads copy at once
    TIMES: gl.constexpr = BN // KEYS
    ALL: gl.constexpr = gl.BlockedLayout([TIMES, 1, VEC], [1, 32 // LANES, LANES], [1, 4, 1], [2, 1, 0])
    time = gl.arange(0, TIMES, gl.SliceLayout(1, gl.SliceLayout(2, ALL)))[:, None]
    key = gl.arange(0, KEYS, gl.SliceLayout(0, gl.SliceLayout(2, ALL)))[None, :]
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(1, ALL)))[None, :]
    column = gl.expand_dims(column, 1)
    keys = n + key + time * KEYS
    there = keys < n_end
    if STEP > 0:
        at = gl.expand_dims(key * STEP, 2) + column + gl.expand_dims(time * (KEYS * STEP), 2)
        at = base + n.to(gl.int64) * STEP + at
    else:
        # A product of two ints of 32 bits is one instruction, of 64 bits four.
        step = stride.to(gl.int64)
        at = gl.expand_dims(key.to(gl.int64) * step * VEC, 2) + column
        at = base + n.to(gl.int64) * step * VEC + at + gl.expand_dims(time * (step * (KEYS * VEC)), 2)
    # Reshaping forgets that rows are whole pieces of 16 bytes.
    at = gl.max_contiguous(gl.multiple_of(at.reshape([BN, BLOCK]), [1, 16]), [1, VEC])
    mask = gl.expand_dims(there, 2) & (column < SIZE)
    # Two copies, so that the one without holes has no mask in registers.
    if holes != 0 if C.range else False:
        word = gl.load(bitmap + (keys >> 5), mask=there, other=0)
        exist = gl.expand_dims(((word >> (keys & 31)) & 1) == 1, 2) & mask
        copy_async(smem, at, mask=gl.max_constancy(exist.reshape([BN, BLOCK]), [1, VEC]))
    else:
        copy_async(smem, at, mask=gl.max_constancy(mask.reshape([BN, BLOCK]), [1, VEC]))


@gluon.jit
def next_block(n, n_end, chunk, end, C: gl.constexpr):
    """(n, n_end) of the block behind the one at n in a chunk up to n_end: in the same chunk, or in the next."""
    if C.levels == 0:  # a program has one chunk
        n += C.block_n
    else:
        n = gl.minimum(n + C.block_n, n_end)
        n_end = gl.where(n == n_end, gl.minimum(n_end + chunk, end), n_end)
    return n, n_end


@gluon.jit
def load_queries(q_smem, Q, b, kv_head, r0, rows, stride_qb, stride_qh, stride_qs, C: gl.constexpr):
    """Bring rows [r0, r0 + R) of a KV head to shared memory: by a copy, or as fp16 beside fp8 keys."""
    R: gl.constexpr = C.rows
    D: gl.constexpr = C.block_d
    LANES: gl.constexpr = D // 8 if D < 256 else 32
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    r = r0 + gl.arange(0, R, gl.SliceLayout(1, LAYOUT))
    d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    head = Q + (b.to(gl.int64) * stride_qb + (kv_head * C.group).to(gl.int64) * stride_qh) * 8
    at = ((r % C.group).to(gl.int64) * stride_qh + (r // C.group).to(gl.int64) * stride_qs) * 8
    if C.fp8:
        d = column_of(d, D)
    mask = (r < rows)[:, None] & (d < C.head_dim)[None, :]
    if C.fp8:
        q_smem.store(gl.load(head + at[:, None] + d[None, :], mask=mask, other=0.0).to(gl.float16))
    else:
        copy_async(q_smem, head + at[:, None] + d[None, :], mask=mask)


@gluon.jit
def _visible(s, n, n_end, row_lo, row_hi, bitmap, holes, C: gl.constexpr):
    """-inf where a row does not see a key; s [N, R]."""
    keys = n + gl.arange(0, s.shape[0], gl.SliceLayout(1, s.type.layout))
    there = keys < n_end
    if C.range:
        if holes != 0:
            word = gl.load(bitmap + (keys >> 5), mask=there, other=0)
            there = there & (((word >> (keys & 31)) & 1) == 1)
    see = there[:, None] & (keys[:, None] >= row_lo[None, :]) & (keys[:, None] < row_hi[None, :])
    return gl.where(see, s, float("-inf"))


@gluon.jit
def fold_scores(s, acc, m, sums, n, n_end, rows_see, bitmap, holes, score_scale, unit, C: gl.constexpr):
    """Fold a block's scores s [N, R] into (m [R], sums [N, R]); returns the probabilities and acc [DV, R] shrunk."""
    if C.softcap:
        s = tanh(s * score_scale)
    row_lo, row_hi, all_lo, all_hi = rows_see
    if (n < all_lo) | (n + s.shape[0] > gl.minimum(n_end, all_hi)) | (holes != 0):
        s = _visible(s, n, n_end, row_lo, row_hi, bitmap, holes, C)
    m_new = gl.maximum(m, gl.max(s, axis=0) * unit)
    # A row that has seen no key yet has m = -inf, and -inf - -inf is NaN.
    m_finite = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(gl.fma(s, gl.full_like(s, 0.0) + unit, gl.full_like(s, 0.0) - m_finite[None, :]))
    alpha = gl.exp2(m - m_finite)
    sums = gl.fma(sums, gl.full_like(s, 0.0) + alpha[None, :], p)
    return p, acc * alpha[None, :], m_new, sums

"""The end of a Hopper decode: merging the chunks of a KV head, normalising, and storing its rows."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .consumer import LN_2, LOG2_E


@gluon.jit
def write_rows(acc, m, l, r, d, Out, Lse, Sinks, b, kv_head, num_queries, ROWS_DIM: gl.constexpr, C: gl.constexpr):
    """Normalise rows r of a KV head and store them, with columns d; acc is [R, DV], or [DV, R] where ROWS_DIM is 1.

    Rows that saw no key give 0. Out's heads lie inside the sequence in memory.
    """
    valid = r < num_queries * C.group
    head = kv_head * C.group + r % C.group
    token = r // C.group
    if C.sinks:
        sink = gl.load(Sinks + head, mask=valid, other=0.0).to(gl.float32) * LOG2_E
        m_new = gl.maximum(m, sink)
        m_finite = gl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = gl.exp2(m - m_finite)
        l = l * alpha + gl.exp2(sink - m_finite)
        m = m_new
    else:
        alpha = gl.full_like(m, 1.0)
    # Not l > 0: a NaN in the inputs must stay one.
    empty = l == 0.0
    shrink = alpha / gl.where(empty, 1.0, l)
    at = ((b.to(gl.int64) * num_queries + token) * (C.num_kv_heads * C.group) + head) * C.value_dim
    if ROWS_DIM == 0:
        out = acc * shrink[:, None]
        at = at[:, None] + d[None, :]
        keep = valid[:, None] & (d < C.value_dim)[None, :]
    else:
        out = acc * shrink[None, :]
        at = at[None, :] + d[:, None]
        keep = valid[None, :] & (d < C.value_dim)[:, None]
    gl.store(Out + at, out.to(Out.dtype.element_ty), mask=keep)
    if C.lse:
        lse = gl.where(empty, float("-inf"), (m + gl.log2(gl.where(empty, 1.0, l))) * LN_2)
        gl.store(Lse + (b * C.num_kv_heads * C.group + head).to(gl.int64) * num_queries + token, lse, mask=valid)


@gluon.jit
def merge(Partial, stats, head_line, r0, rows, used, num_splits, C: gl.constexpr):
    """(acc [R, DV], m [R], l [R]) of the rows from r0 on, from the `used` chunks that wrote them, in their order.

    .cg: other programs wrote these; the L1 of this one may be stale.
    """
    R: gl.constexpr = C.merge_rows
    DV: gl.constexpr = C.block_dv
    S: gl.constexpr = C.merge_splits
    VEC: gl.constexpr = 1 if R * DV <= 128 else 4 if R * DV >= 512 else R * DV // 128
    LANES: gl.constexpr = 32 if DV // VEC >= 32 else DV // VEC
    ROW_WARPS: gl.constexpr = 4 if R >= 4 * (32 // LANES) else R // (32 // LANES) if R >= 32 // LANES else 1
    WARPS: gl.constexpr = [1, ROW_WARPS, 4 // ROW_WARPS]
    ALL: gl.constexpr = gl.BlockedLayout([S, 1, VEC], [1, 32 // LANES, LANES], WARPS, [2, 1, 0])
    OUT: gl.constexpr = gl.SliceLayout(0, ALL)
    s = gl.arange(0, S, gl.SliceLayout(1, gl.SliceLayout(2, ALL)))
    r = r0 + gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(2, ALL)))
    d = gl.arange(0, DV, gl.SliceLayout(0, gl.SliceLayout(1, ALL)))
    m = gl.full([R], float("-inf"), gl.float32, gl.SliceLayout(1, OUT))
    l = gl.zeros([R], gl.float32, gl.SliceLayout(1, OUT))
    acc = gl.zeros([R, DV], gl.float32, OUT)
    for s0 in range(0, used, S):
        line = (head_line + r.to(gl.int64) * num_splits)[None, :] + (s0 + s)[:, None]  # [S, R]
        there = (s0 + s < used)[:, None] & (r < rows)[None, :]
        m_s = gl.load(stats + line * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
        l_s = gl.load(stats + line * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        at = gl.expand_dims(line * DV, 2) + gl.expand_dims(gl.expand_dims(d, 0), 1)
        acc_s = gl.load(Partial + at, mask=gl.expand_dims(there, 2), other=0.0, cache_modifier=".cg")
        m_here = gl.convert_layout(gl.max(m_s, axis=0), m.type.layout)
        m_new = gl.maximum(m, m_here)
        m_finite = gl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = gl.exp2(m - m_finite)
        weight = gl.exp2(m_s - gl.convert_layout(m_finite, gl.SliceLayout(0, m_s.type.layout))[None, :])
        l_here = gl.convert_layout(gl.sum(l_s * weight, axis=0), m.type.layout)
        l = gl.fma(l, alpha, l_here)
        acc = gl.fma(acc, gl.zeros_like(acc) + alpha[:, None], gl.sum(acc_s * gl.expand_dims(weight, 2), axis=0))
        m = m_new
    return acc, m, l

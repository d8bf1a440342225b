"""The end of a Hopper decode: merging the chunks of a KV head in a tree, normalising, and storing its rows."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .consumer import LN_2, LOG2_E
from .triton_api import barrier


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
    # + 0.0: whether a -0.0 comes out of the merge as one depends on how many nodes without keys took part.
    if ROWS_DIM == 0:
        out = acc * shrink[:, None] + 0.0
        at = at[:, None] + d[None, :]
        keep = valid[:, None] & (d < C.value_dim)[None, :]
    else:
        out = acc * shrink[None, :] + 0.0
        at = at[None, :] + d[:, None]
        keep = valid[None, :] & (d < C.value_dim)[:, None]
    gl.store(Out + at, out.to(Out.dtype.element_ty), mask=keep)
    if C.lse:
        lse = gl.where(empty, float("-inf"), (m + gl.log2(gl.where(empty, 1.0, l))) * LN_2)
        gl.store(Lse + (b * C.num_kv_heads * C.group + head).to(gl.int64) * num_queries + token, lse, mask=valid)


@gluon.jit
def combine(left, right, ROWS_DIM: gl.constexpr):
    """(acc, m, l) of two neighbours in one. With one that has seen nothing (0, -inf, 0) the other stays as it is.

    Every product and sum is spelled out: the bits must be the same wherever this is compiled into.
    """
    left_acc, left_m, left_l = left
    right_acc, right_m, right_l = right
    m = gl.maximum(left_m, right_m)
    m_finite = gl.where(m == float("-inf"), 0.0, m)
    a = gl.exp2(left_m - m_finite)
    b = gl.exp2(right_m - m_finite)
    l = gl.fma(left_l, a, right_l * b)
    zeros = gl.zeros_like(left_acc)
    if ROWS_DIM == 0:
        acc = gl.fma(left_acc, zeros + a[:, None], right_acc * b[:, None])
    else:
        acc = gl.fma(left_acc, zeros + a[None, :], right_acc * b[None, :])
    return acc, m, l


@gluon.jit
def push(stack, acc, m, l, number, C: gl.constexpr):
    """The stack after chunk `number` of a program, which is not its last: entry i holds a tree of 2**i chunks."""
    LEVELS: gl.constexpr = C.levels
    for i in gl.static_range(LEVELS):
        # All bits below are set where the chunk completes a tree of this size.
        if (number & ((2 << i) - 1)) == (1 << i) - 1:
            stack = stack[: 3 * i] + (acc, m, l) + stack[3 * i + 3 :]
        if i < LEVELS - 1:
            acc, m, l = combine(stack[3 * i : 3 * i + 3], (acc, m, l), 1)
    return stack


@gluon.jit
def unstack(stack, acc, m, l, number, C: gl.constexpr):
    """(acc, m, l) of a program's whole tree, which ends with chunk `number`."""
    LEVELS: gl.constexpr = C.levels
    for i in gl.static_range(LEVELS):
        if ((number >> i) & 1) == 1:
            acc, m, l = combine(stack[3 * i : 3 * i + 3], (acc, m, l), 1)
    return acc, m, l


@gluon.jit
def store_node(acc, m, l, Partial, stats, line, valid, d, ROWS_DIM: gl.constexpr, C: gl.constexpr):
    """Store the sums of some rows, those of row i at line[i]."""
    if ROWS_DIM == 0:
        gl.store(Partial + line[:, None] * C.block_dv + d[None, :], acc, mask=valid[:, None])
    else:
        gl.store(Partial + line[None, :] * C.block_dv + d[:, None], acc, mask=valid[None, :])
    gl.store(stats + line * 2, m, mask=valid)
    gl.store(stats + line * 2 + 1, l, mask=valid)


@gluon.jit
def _merge_nodes(Partial, stats, line, valid, count, d, C: gl.constexpr):
    """(acc [R, DV], m [R], l [R]) of `count` neighbours, whose sums are at lines `line` [R] and behind.

    All loads come first. .cg: other programs wrote these; the L1 of this one may be stale.
    """
    FAN: gl.constexpr = C.fan_in
    sums = Partial + line[:, None] * C.block_dv + d[None, :]
    stats += line * 2
    nodes = ()
    for i in gl.static_range(FAN):
        there = valid & (i < count)
        acc = gl.load(sums + i * C.block_dv, mask=there[:, None], other=0.0, cache_modifier=".cg")
        m = gl.load(stats + i * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
        l = gl.load(stats + (i * 2 + 1), mask=there, other=0.0, cache_modifier=".cg")
        nodes = nodes + ((acc, m, l),)
    if FAN >= 16:
        nodes = _pairs(nodes, 8)
    if FAN >= 8:
        nodes = _pairs(nodes, 4)
    nodes = _pairs(_pairs(nodes, 2), 1)
    return nodes[0]


@gluon.jit
def _pairs(nodes, COUNT: gl.constexpr):
    merged = ()
    for i in gl.static_range(COUNT):
        merged = merged + (combine(nodes[2 * i], nodes[2 * i + 1], 0),)
    return merged


@gluon.jit
def merge_arrived(
    Partial, stats, Count, Out, Lse, Sinks, b, kv_head, num_queries, head_line, unit, tile, node, nodes, num_splits,
    num_lines, C: gl.constexpr,
):  # fmt: skip
    """Report that this program's node of the tree is stored, and merge it with its neighbours if it is their last.

    Each merge makes a node of the level above, which is stored and reported in its turn; the top is the answer.

    Args:
        node, nodes: this program's node, and how many there are on its level; at least two.
        num_splits, num_lines: most nodes of its level, and of all; a row's sums lie level by level.
    """
    R: gl.constexpr = C.merge_rows
    DV: gl.constexpr = C.block_dv
    F: gl.constexpr = C.fan_in
    VEC: gl.constexpr = 1 if R * DV <= 128 else 4 if R * DV >= 512 else R * DV // 128
    LANES: gl.constexpr = 32 if DV // VEC >= 32 else DV // VEC
    ROW_WARPS: gl.constexpr = 4 if R >= 4 * (32 // LANES) else R // (32 // LANES) if R >= 32 // LANES else 1
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, VEC], [32 // LANES, LANES], [ROW_WARPS, 4 // ROW_WARPS], [1, 0])
    d = gl.arange(0, DV, gl.SliceLayout(0, LAYOUT))
    rows = num_queries * C.group
    counters = Count + unit * (num_lines - num_splits) - num_splits  # of the nodes that are made of others
    level = num_splits * 0  # where this level lies
    width = num_splits  # its most nodes
    while nodes > 1:
        parent = node // F
        children = gl.minimum(nodes - parent * F, F)
        above = level + width
        # Every thread's stores must stand before the one thread that counts says that they do.
        barrier()
        nodes = (nodes + F - 1) // F
        if gl.atomic_add(counters + above + parent, 1, sem="acq_rel", scope="gpu") == children - 1:
            gl.store(counters + above + parent, 0)
            for r0 in range(tile * C.rows, gl.minimum((tile + 1) * C.rows, rows), R):
                r = r0 + gl.arange(0, R, gl.SliceLayout(1, LAYOUT))
                line = head_line + r.to(gl.int64) * num_lines
                acc, m, l = _merge_nodes(Partial, stats, line + level + parent * F, r < rows, children, d, C)
                if nodes == 1:
                    write_rows(acc, m, l, r, d, Out, Lse, Sinks, b, kv_head, num_queries, 0, C)
                else:
                    store_node(acc, m, l, Partial, stats, line + above + parent, r < rows, d, 0, C)
            node = parent
            level = above
            width = (width + F - 1) // F
        else:
            nodes = nodes * 0

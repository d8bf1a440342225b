"""The end of a Hopper decode: merging the chunks of a KV head in a tree, normalising, and storing its rows.

Of neighbours in the tree the one of the highest number merges: it reads what the others wrote until all is there, see
`decode_slots`. It waits for programs that were started before it, and they for none behind: a GPU starts programs in
the order of their numbers, however few of them it runs at once.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..rows import end_of_rows
from .mailboxes import clear_slots, join, pieces_of, read_slots, rows_layout, split, write_slot


@gluon.jit
def _shrink(m, l, r, once, Lse, Sinks, b, kv_head, num_queries, C: gl.constexpr):
    """What rows r of a KV head are multiplied by in the end, 0 where a row saw no key. Stores lse where it is wanted.

    Shapes: any; once: where a row's lse is to be stored.
    """
    valid = r < num_queries * C.group
    head = kv_head * C.group + r % C.group
    token = r // C.group
    sink = m
    if C.sinks:
        sink = gl.load(Sinks + head, mask=valid, other=0.0)
    shrink, lse = end_of_rows(m, l, sink, C)
    if C.lse:
        at = (b * C.num_kv_heads * C.group + head).to(gl.int64) * num_queries + token
        gl.store(Lse + at, lse, mask=valid & once)
    return shrink


@gluon.jit
def _store_rows(out, r, d, Out, b, kv_head, num_queries, C: gl.constexpr):
    """Store columns d of rows r. Out's heads lie inside the sequence in memory."""
    head = kv_head * C.group + r % C.group
    at = ((b.to(gl.int64) * num_queries + r // C.group) * (C.num_kv_heads * C.group) + head) * C.value_dim
    keep = (r < num_queries * C.group) & (d < C.value_dim)
    # + 0.0: whether a -0.0 comes out of the merge as one depends on how many nodes without keys took part.
    gl.store(Out + at + d, (out + 0.0).to(Out.dtype.element_ty), mask=keep)


@gluon.jit
def write_rows(acc, m, l, r, d, Out, Lse, Sinks, b, kv_head, num_queries, C: gl.constexpr):
    """Normalise rows r [R] of a KV head and store them, with columns d [DV]; acc is [DV, R]."""
    shrink = _shrink(m, l, r, r >= 0, Lse, Sinks, b, kv_head, num_queries, C)
    _store_rows(acc * shrink[None, :], r[None, :], d[:, None], Out, b, kv_head, num_queries, C)


@gluon.jit
def _weigh(left_m, left_l, right_m, right_l):
    """(m, l) of two neighbours in one, and what the sums of each are multiplied by.

    Every product and sum is spelled out, here and where sums are added: the bits must be the same wherever this is
    compiled into. With one that has seen nothing (0, -inf, 0) the other stays as it is.
    """
    m = gl.maximum(left_m, right_m)
    m_finite = gl.where(m == float("-inf"), 0.0, m)
    a = gl.exp2(left_m - m_finite)
    b = gl.exp2(right_m - m_finite)
    return m, gl.fma(left_l, a, right_l * b), a, b


@gluon.jit
def _combine(left, right):
    """(acc [DV, R], m [R], l [R]) of two neighbours in one."""
    m, l, a, b = _weigh(left[1], left[2], right[1], right[2])
    return gl.fma(left[0], gl.zeros_like(left[0]) + a[None, :], right[0] * b[None, :]), m, l


@gluon.jit
def push(stack, acc, m, l, number, C: gl.constexpr):
    """The stack after chunk `number` of a program, which is not its last: entry i holds a tree of 2**i chunks."""
    LEVELS: gl.constexpr = C.levels
    for i in gl.static_range(LEVELS):
        # All bits below are set where the chunk completes a tree of this size.
        if (number & ((2 << i) - 1)) == (1 << i) - 1:
            stack = stack[: 3 * i] + (acc, m, l) + stack[3 * i + 3 :]
        if i < LEVELS - 1:
            acc, m, l = _combine(stack[3 * i : 3 * i + 3], (acc, m, l))
    return stack


@gluon.jit
def unstack(stack, acc, m, l, number, C: gl.constexpr):
    """(acc, m, l) of a program's whole tree, which ends with chunk `number`."""
    LEVELS: gl.constexpr = C.levels
    for i in gl.static_range(LEVELS):
        if ((number >> i) & 1) == 1:
            acc, m, l = _combine(stack[3 * i : 3 * i + 3], (acc, m, l))
    return acc, m, l


@gluon.jit
def _pairs(nodes, COUNT: gl.constexpr, PIECES: gl.constexpr):
    """Half of `nodes`, each of two neighbours; a node is a tuple of its columns' pieces, m and l, all of one shape."""
    merged = ()
    for i in gl.static_range(COUNT):
        left = nodes[2 * i]
        right = nodes[2 * i + 1]
        m, l, a, b = _weigh(left[PIECES], left[PIECES + 1], right[PIECES], right[PIECES + 1])
        node = ()
        for k in gl.static_range(PIECES):
            node = node + (gl.fma(left[k], a, right[k] * b),)
        merged = merged + (node + (m, l),)
    return merged


@gluon.jit
def _load_rows(acc_smem, m_smem, l_smem):
    """A node from shared memory, [R, DV] and [R]."""
    PIECES: gl.constexpr = pieces_of(acc_smem.shape[0], acc_smem.shape[1])
    pieces = split(acc_smem.load(rows_layout(acc_smem.shape[0], acc_smem.shape[1])), PIECES)
    ROWS: gl.constexpr = gl.SliceLayout(1, pieces[0].type.layout)
    zeros = gl.zeros_like(pieces[0])
    return pieces + (m_smem.load(ROWS)[:, None] + zeros, l_smem.load(ROWS)[:, None] + zeros)


@gluon.jit
def _keep_rows(node, acc_smem, m_smem, l_smem):
    """Put a node where `_load_rows` finds it."""
    PIECES: gl.constexpr = pieces_of(acc_smem.shape[0], acc_smem.shape[1])
    acc_smem.store(join(node[:PIECES], acc_smem.shape[0], acc_smem.shape[1]))
    m_smem.store(gl.max(node[PIECES], axis=1))  # all pieces of a row have the same
    l_smem.store(gl.max(node[PIECES + 1], axis=1))


@gluon.jit
def _write_pieces(node, r0, Out, Lse, Sinks, b, kv_head, num_queries, C: gl.constexpr):
    """Normalise and store the rows of a node, from r0 on."""
    R: gl.constexpr = C.merge_rows
    PIECES: gl.constexpr = pieces_of(R, C.block_dv)
    THREADS: gl.constexpr = node[0].type.layout
    r = r0 + gl.arange(0, R, gl.SliceLayout(1, THREADS))[:, None]
    piece = gl.arange(0, C.block_dv // PIECES, gl.SliceLayout(0, THREADS))[None, :]
    shrink = _shrink(node[PIECES], node[PIECES + 1], r + piece * 0, piece == 0, Lse, Sinks, b, kv_head, num_queries, C)
    out = ()
    for k in gl.static_range(PIECES):
        out = out + (node[k] * shrink,)
    out = join(out, R, C.block_dv)
    COLUMNS: gl.constexpr = out.type.layout
    r = r0 + gl.arange(0, R, gl.SliceLayout(1, COLUMNS))[:, None]
    d = gl.arange(0, C.block_dv, gl.SliceLayout(0, COLUMNS))[None, :]
    _store_rows(out, r, d, Out, b, kv_head, num_queries, C)


@gluon.jit
def merge_nodes(
    acc, m, l, addresses, Out, Lse, Sinks, b, kv_head, num_queries, tile, node, nodes, num_splits, C: gl.constexpr
):  # fmt: skip
    """Write this program's node of the tree, or merge it with those before it if it is the last of its neighbours.

    Each merge makes a node of the level above, with which the same is done; the top is the answer.

    Args:
        acc, m, l: this program's sums, [DV, rows of a tile], [rows of a tile].
        addresses: see `slot_addresses`; a row's nodes lie level by level.
        node, nodes: this program's node, and how many there are on its level; at least two.
        num_splits: most nodes of its level.
    """
    R: gl.constexpr = C.merge_rows
    DV: gl.constexpr = C.block_dv
    F: gl.constexpr = C.fan_in
    GROUPS: gl.constexpr = C.merge_groups
    PIECES: gl.constexpr = pieces_of(R, DV)
    # Through shared memory from wgmma's layout to a few rows at a time, of which a thread has `PIECES` columns.
    PHASES: gl.constexpr = 1 if R < 4 else 2 if R == 4 else 4  # rows that the same warp stores are on different banks
    acc_smem = gl.allocate_shared_memory(gl.float32, [C.rows, DV], gl.SwizzledSharedLayout(8, 2, PHASES, [1, 0]))
    m_smem = gl.allocate_shared_memory(gl.float32, [C.rows], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    l_smem = gl.allocate_shared_memory(gl.float32, [C.rows], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    acc_smem.store(acc.permute((1, 0)))
    m_smem.store(m)
    l_smem.store(l)
    rows = num_queries * C.group
    level = num_splits * 0  # where this level lies
    width = num_splits  # its most nodes
    while nodes > 1:
        first = node // F * F
        mine = node - first
        above = (nodes + F - 1) // F
        last = mine == gl.minimum(nodes - first, F) - 1  # of its neighbours
        for g in gl.static_range(GROUPS):
            r0 = tile * C.rows + g * R
            if r0 < rows:
                own = _load_rows(acc_smem.slice(g * R, R), m_smem.slice(g * R, R), l_smem.slice(g * R, R))
                if last:
                    read = read_slots(own, addresses[2 * g], addresses[2 * g + 1], level + first, mine, rows - r0, C)
                    if F >= 16:
                        read = _pairs(read, 8, PIECES)
                    if F >= 8:
                        read = _pairs(read, 4, PIECES)
                    merged = _pairs(_pairs(read, 2, PIECES), 1, PIECES)[0]
                    if above == 1:
                        _write_pieces(merged, r0, Out, Lse, Sinks, b, kv_head, num_queries, C)
                    else:
                        _keep_rows(merged, acc_smem.slice(g * R, R), m_smem.slice(g * R, R), l_smem.slice(g * R, R))
                    # Behind the answer, for which somebody waits.
                    clear_slots(own[0], addresses[2 * g], addresses[2 * g + 1], level + first, mine, rows - r0, C)
                else:
                    write_slot(own, addresses[2 * g], addresses[2 * g + 1], level + node, rows - r0, C)
        nodes = gl.where(last, above, 0)
        node = node // F
        level += width
        width = (width + F - 1) // F

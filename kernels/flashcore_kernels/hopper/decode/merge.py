"""The end of a Hopper decode: merging the chunks of a KV head in a tree, normalising, and storing its rows.

Of neighbours in the tree the one of the highest number merges: it reads what the others write until all is there, see
mailboxes.py. That always comes to an end. A GPU starts programs in the order of their numbers, however few of them it
runs at once, and a program waits only for lower numbers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..rows import end_of_rows
from .mailboxes import clear_mailboxes, join, piece_width, read_mailboxes, rows_layout, split, write_mailbox
from .records import Sums


@gluon.jit
def _shrink(m, l, r, once, answer, C: gl.constexpr):
    """The factors of `end_of_rows` for rows r of a KV head, whose maxima and sums are m and l. Stores lse where wanted.

    Args:
        m, l, r: of any one shape.
        once: of that shape: where a row's lse is to be stored, if a row has several elements.
        answer: an Answer.
    """
    valid = r < answer.num_queries * C.group
    head = answer.kv_head * C.group + r % C.group
    token = r // C.group
    sink = m
    if C.sinks:
        sink = gl.load(answer.sinks + head, mask=valid, other=0.0)
    shrink, lse = end_of_rows(m, l, sink, C)
    if C.lse:
        if C.paged:
            at = head.to(gl.int64) * answer.lse_stride + answer.b
        else:
            at = (answer.b * C.num_kv_heads * C.group + head).to(gl.int64) * answer.lse_stride + token
        gl.store(answer.lse + at, lse, mask=valid & once)
    return shrink


@gluon.jit
def _store_rows(out, r, d, answer, C: gl.constexpr):
    """Store columns d of rows r of a KV head; out, r and d broadcast to one shape."""
    head = answer.kv_head * C.group + r % C.group
    token = answer.b.to(gl.int64) * answer.num_queries + r // C.group  # of all sequences
    at = (token * (C.num_kv_heads * C.group) + head) * C.value_dim
    keep = (r < answer.num_queries * C.group) & (d < C.value_dim)
    # + 0.0: whether a -0.0 comes out of the merge as one depends on how many nodes without keys took part.
    gl.store(answer.out + at + d, (out + 0.0).to(answer.out.dtype.element_ty), mask=keep)


@gluon.jit
def write_rows(sums, r, d, answer, C: gl.constexpr):
    """Normalise and store the Sums of rows r [R] of a KV head; d [DV]: the columns that the rows of acc are."""
    shrink = _shrink(sums.m, sums.l, r, r >= 0, answer, C)
    _store_rows(sums.acc * shrink[None, :], r[None, :], d[:, None], answer, C)


@gluon.jit
def _weigh(left_m, left_l, right_m, right_l):
    """(m, l, a, b): maxima and sums of two neighbours in one, and the factors of the left and of the right acc.

    Which product is fused with a sum is spelled out, here and where acc is added: the bits must be the same wherever
    this is compiled into. A neighbour that has seen nothing (0, -inf, 0) leaves the other as it is.
    """
    m = gl.maximum(left_m, right_m)
    m_finite = gl.where(m == float("-inf"), 0.0, m)
    a = gl.exp2(left_m - m_finite)
    b = gl.exp2(right_m - m_finite)
    return m, gl.fma(left_l, a, right_l * b), a, b


@gluon.jit
def _combine(left, right):
    """The Sums of two neighbours in one."""
    # By position: with Triton 3.6 a record that is put into a tuple, as the stack is, loses its names.
    left_acc, left_m, left_l = left
    m, l, a, b = _weigh(left_m, left_l, right.m, right.l)
    return Sums(acc=gl.fma(left_acc, gl.zeros_like(left_acc) + a[None, :], right.acc * b[None, :]), m=m, l=l)


@gluon.jit
def push(stack, sums, number, C: gl.constexpr):
    """The stack after chunk `number` of a program, which is not its last.

    Args:
        stack: entry i has the Sums of a tree of 2**i chunks.
        sums: of the chunk.
    """
    LEVELS: gl.constexpr = C.levels
    for i in gl.static_range(LEVELS):
        # All bits below are set where the chunk completes a tree of this size.
        if (number & ((2 << i) - 1)) == (1 << i) - 1:
            stack = stack[:i] + (sums,) + stack[i + 1 :]
        if i < LEVELS - 1:
            sums = _combine(stack[i], sums)
    return stack


@gluon.jit
def unstack(stack, sums, number, C: gl.constexpr):
    """The Sums of a program's whole tree, which ends with chunk `number`, of which `sums` are."""
    LEVELS: gl.constexpr = C.levels
    for i in gl.static_range(LEVELS):
        if ((number >> i) & 1) == 1:
            sums = _combine(stack[i], sums)
    return sums


@gluon.jit
def _pairs(nodes, COUNT: gl.constexpr, WIDTH: gl.constexpr):
    """COUNT nodes of twice as many, each of two neighbours; for nodes see `read_mailboxes`."""
    merged = ()
    for i in gl.static_range(COUNT):
        left = nodes[2 * i]
        right = nodes[2 * i + 1]
        m, l, a, b = _weigh(left[WIDTH], left[WIDTH + 1], right[WIDTH], right[WIDTH + 1])
        node = ()
        for k in gl.static_range(WIDTH):
            node = node + (gl.fma(left[k], a, right[k] * b),)
        merged = merged + (node + (m, l),)
    return merged


@gluon.jit
def _load_rows(acc_smem, m_smem, l_smem):
    """A node (see `read_mailboxes`) from shared memory, where it is [R, DV] and twice [R]."""
    WIDTH: gl.constexpr = piece_width(acc_smem.shape[0], acc_smem.shape[1])
    columns = split(acc_smem.load(rows_layout(acc_smem.shape[0], acc_smem.shape[1])), WIDTH)
    ROWS: gl.constexpr = gl.SliceLayout(1, columns[0].type.layout)
    zeros = gl.zeros_like(columns[0])
    return columns + (m_smem.load(ROWS)[:, None] + zeros, l_smem.load(ROWS)[:, None] + zeros)


@gluon.jit
def _keep_rows(node, acc_smem, m_smem, l_smem):
    """Put a node where `_load_rows` finds it."""
    WIDTH: gl.constexpr = piece_width(acc_smem.shape[0], acc_smem.shape[1])
    acc_smem.store(join(node[:WIDTH], acc_smem.shape[0], acc_smem.shape[1]))
    m_smem.store(gl.max(node[WIDTH], axis=1))  # all pieces of a row have the same
    l_smem.store(gl.max(node[WIDTH + 1], axis=1))


@gluon.jit
def _write_node(node, r0, answer, C: gl.constexpr):
    """Normalise and store the rows of a node, from r0 on."""
    R: gl.constexpr = C.merge_rows
    WIDTH: gl.constexpr = piece_width(R, C.block_dv)
    THREADS: gl.constexpr = node[0].type.layout
    r = r0 + gl.arange(0, R, gl.SliceLayout(1, THREADS))[:, None]
    piece = gl.arange(0, C.block_dv // WIDTH, gl.SliceLayout(0, THREADS))[None, :]
    shrink = _shrink(node[WIDTH], node[WIDTH + 1], r + piece * 0, piece == 0, answer, C)
    out = ()
    for k in gl.static_range(WIDTH):
        out = out + (node[k] * shrink,)
    out = join(out, R, C.block_dv)
    COLUMNS: gl.constexpr = out.type.layout
    r = r0 + gl.arange(0, R, gl.SliceLayout(1, COLUMNS))[:, None]
    d = gl.arange(0, C.block_dv, gl.SliceLayout(0, COLUMNS))[None, :]
    _store_rows(out, r, d, answer, C)


@gluon.jit
def merge_nodes(sums, addresses, answer, tile, node, nodes, num_splits, C: gl.constexpr):
    """Write this program's node of the tree, or merge it with those before it if it is the last of its neighbours.

    Each merge makes a node of the level above, with which the same is done; the top is the answer.

    Args:
        sums: this program's Sums, of all rows of a tile.
        addresses: see `mailbox_addresses`; a row's nodes lie level by level.
        answer: an Answer.
        tile: number of the tile among those of the KV head.
        node, nodes: this program's node, and how many there are on its level; at least two.
        num_splits: most nodes of its level.
    """
    R: gl.constexpr = C.merge_rows
    DV: gl.constexpr = C.block_dv
    F: gl.constexpr = C.fan_in
    GROUPS: gl.constexpr = C.merge_groups
    WIDTH: gl.constexpr = piece_width(R, DV)
    # Through shared memory from wgmma's layout to a few rows at a time, of which a thread has a piece.
    PHASES: gl.constexpr = 1 if R < 4 else 2 if R == 4 else 4  # rows that the same warp stores are on different banks
    acc_smem = gl.allocate_shared_memory(gl.float32, [C.rows, DV], gl.SwizzledSharedLayout(8, 2, PHASES, [1, 0]))
    m_smem = gl.allocate_shared_memory(gl.float32, [C.rows], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    l_smem = gl.allocate_shared_memory(gl.float32, [C.rows], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    acc_smem.store(sums.acc.permute((1, 0)))
    m_smem.store(sums.m)
    l_smem.store(sums.l)
    rows = answer.num_queries * C.group
    level = num_splits * 0  # where this level lies
    most_nodes = num_splits  # that it can have
    while nodes > 1:
        first = node // F * F
        own_index = node - first
        above = (nodes + F - 1) // F
        last = own_index == gl.minimum(nodes - first, F) - 1  # of its neighbours
        for g in gl.static_range(GROUPS):
            sums_at = addresses[2 * g]
            stats_at = addresses[2 * g + 1]
            r0 = tile * C.rows + g * R
            if r0 < rows:
                own = _load_rows(acc_smem.slice(g * R, R), m_smem.slice(g * R, R), l_smem.slice(g * R, R))
                if last:
                    read = read_mailboxes(own, sums_at, stats_at, level + first, own_index, rows - r0, C)
                    if F >= 16:
                        read = _pairs(read, 8, WIDTH)
                    if F >= 8:
                        read = _pairs(read, 4, WIDTH)
                    merged = _pairs(_pairs(read, 2, WIDTH), 1, WIDTH)[0]
                    if above == 1:
                        _write_node(merged, r0, answer, C)
                    else:
                        _keep_rows(merged, acc_smem.slice(g * R, R), m_smem.slice(g * R, R), l_smem.slice(g * R, R))
                    # Behind the answer, for which somebody waits.
                    clear_mailboxes(own[0], sums_at, stats_at, level + first, own_index, rows - r0, C)
                else:
                    write_mailbox(own, sums_at, stats_at, level + node, rows - r0, C)
        nodes = gl.where(last, above, 0)
        node = node // F
        level += most_nodes
        most_nodes = (most_nodes + F - 1) // F

"""Mailboxes: memory through which programs of a Hopper decode hand partial sums to each other.

There is one for each node of the tree and row, and the sums in it are their own flag. Before a launch all words are
`UNWRITTEN`: the bits of a NaN that is never written as a sum. Whoever needs a node's sums reads its mailbox until these
bits are gone, and puts them back for the next launch. So no counter is asked and no fence is waited for: sums are there
when their bits are.

Can a reader see half of a node? A thread merges a few columns of a row that lie next to each other: that is its piece.
It reads two things of a node, each in one access, which is never seen half done. PTX promises that for a scalar of up
to 128 bits. One is the piece's sums, the other the row's maximum and its sum of probabilities. So one word of each is
looked at. Neither must be ordered among other accesses: all are relaxed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...runtime import workspace
from ..triton_api import barrier

UNWRITTEN = gl.constexpr(workspace.UNWRITTEN)
WRITTEN = gl.constexpr(0xFFFFFFFE)  # the most that is written, as an unsigned number


@gluon.constexpr_function
def piece_width(rows, columns):
    """Columns of a piece, where 4 warps merge tiles [rows, columns] at once."""
    return min(max(rows * columns // 128, 1), 4)


@gluon.constexpr_function
def _pieces_each(rows, columns):
    """Pieces that a thread has of such a tile, each of another row."""
    return max(rows * columns // 512, 1)


@gluon.constexpr_function
def rows_layout(rows, columns):
    """Layout of the tile [rows, columns] that 4 warps merge at once."""
    width = piece_width(rows, columns)
    lanes = min(columns // width, 32)
    row_warps = min(4, max(rows // (32 // lanes), 1))
    return gl.BlockedLayout([1, width], [32 // lanes, lanes], [row_warps, 4 // row_warps], [1, 0])


@gluon.jit
def split(x, WIDTH: gl.constexpr):
    """For each k < WIDTH, column k of all pieces: columns k, k + WIDTH, k + 2 * WIDTH, ... of x [R, DV]."""
    R: gl.constexpr = x.shape[0]
    DV: gl.constexpr = x.shape[1]
    parts = (x,)
    if WIDTH == 2:
        parts = x.reshape([R, DV // 2, 2]).split()
    if WIDTH == 4:
        even, odd = x.reshape([R, DV // 2, 2]).split()
        first, third = even.reshape([R, DV // 4, 2]).split()
        second, fourth = odd.reshape([R, DV // 4, 2]).split()
        parts = (first, second, third, fourth)
    return parts


@gluon.jit
def join(parts, R: gl.constexpr, DV: gl.constexpr):
    """x [R, DV], of which `split` made `parts`."""
    WIDTH: gl.constexpr = len(parts)
    x = parts[0]
    if WIDTH == 2:
        x = gl.join(parts[0], parts[1])
    if WIDTH == 4:
        x = gl.join(gl.join(parts[0], parts[2]), gl.join(parts[1], parts[3]))
    return x.reshape([R, DV])


@gluon.constexpr_function
def _ptx_type(words: int) -> str:
    """PTX type of so many words as one scalar."""
    return f".b{32 * words}"


@gluon.constexpr_function
def _pack(scalar, words):
    """PTX that makes one scalar of words."""
    if len(words) == 1:
        return f"mov.b32 {scalar}, {words[0]};"
    if len(words) == 2:
        return f"mov.b64 {scalar}, {{{words[0]}, {words[1]}}};"
    halves = " ".join(f"mov.b64 half{i}, {{{words[2 * i]}, {words[2 * i + 1]}}};" for i in range(2))
    return f"{halves} mov.b128 {scalar}, {{half0, half1}};"


@gluon.constexpr_function
def _unpack(words, scalar):
    """PTX that takes a scalar apart into words."""
    if len(words) == 1:
        return f"mov.b32 {words[0]}, {scalar};"
    if len(words) == 2:
        return f"mov.b64 {{{words[0]}, {words[1]}}}, {scalar};"
    halves = " ".join(f"mov.b64 {{{words[2 * i]}, {words[2 * i + 1]}}}, half{i};" for i in range(2))
    return f"mov.b128 {{half0, half1}}, {scalar}; {halves}"


@gluon.constexpr_function
def _read_ptx(fan, width, times, columns):
    """PTX that reads `times` pieces, of `width` columns each, of each of `fan` nodes until all are there.

    Results, each of them `times` registers: for each node a piece's sums, the row's maximum, its sum of probabilities.
    Arguments: the same of the thread's own node; addresses of the first node's sums and of its other two; the own
    node's index. Nodes before it are waited for, those behind are as if they had seen no key.
    """
    each = width + 2

    def result(node, k, t):
        return f"${(node * each + k) * times + t}"

    def argument(k, t):
        return f"${((fan + 1) * each - each + k) * times + t}"

    absent = ["0f00000000"] * width + ["0fFF800000", "0f00000000"]
    every = [(i, t) for i in range(fan) for t in range(times)]
    code = ["{ .reg .pred p, q; .reg .b32 last; .reg .b64 half0, half1;"]
    code += [f".reg .b32 word{k};" for k in range(each)]
    code += [f".reg {_ptx_type(width)} sums{i}_{t}; .reg .b64 stats{i}_{t};" for i, t in every]
    words = [f"word{k}" for k in range(each)]
    for t in range(times):  # what is the own node's is there
        code += [f".reg .b32 own{k}_{t}; mov.b32 own{k}_{t}, {argument(k, t)};" for k in range(each)]
        code += [f"min.u32 own{k}_{t}, own{k}_{t}, {WRITTEN.value};" for k in (width - 1, each - 1)]
    for i, t in every:
        code += [f"setp.lt.s32 p, {i}, {argument(each + 2, t)}; setp.eq.s32 q, {i}, {argument(each + 2, t)};"]
        for k in range(each):
            code += [f"selp.b32 {words[k]}, own{k}_{t}, {absent[k]}, q;"]
            # What is read says by its last word whether it is there.
            code += [f"selp.b32 {words[k]}, {UNWRITTEN.value}, {words[k]}, p;"] if k in (width - 1, each - 1) else []
        code += [_pack(f"sums{i}_{t}", words[:width]), _pack(f"stats{i}_{t}", words[width:])]
    code += ["AGAIN:"]
    for i, t in every:
        code += [_unpack(words[:width], f"sums{i}_{t}"), _unpack(words[width:], f"stats{i}_{t}")]
        code += [
            f"setp.eq.s32 p, {words[width - 1]}, {UNWRITTEN.value}; setp.eq.s32 q, {words[-1]}, {UNWRITTEN.value};"
        ]
        code += [f"@p ld.relaxed.gpu.global{_ptx_type(width)} sums{i}_{t}, [{argument(each, t)} + {4 * columns * i}];"]
        code += [f"@q ld.relaxed.gpu.global.b64 stats{i}_{t}, [{argument(each + 1, t)} + {8 * i}];"]
    code += ["mov.b32 last, 0;"]
    for i, t in every:
        code += [_unpack(words[:width], f"sums{i}_{t}"), _unpack(words[width:], f"stats{i}_{t}")]
        code += [f"max.u32 word0, {words[width - 1]}, {words[-1]}; max.u32 last, last, word0;"]
    code += [f"setp.eq.s32 p, last, {UNWRITTEN.value}; @p bra AGAIN;"]
    for i, t in every:
        results = [result(i, k, t) for k in range(each)]
        code += [_unpack(results[:width], f"sums{i}_{t}"), _unpack(results[width:], f"stats{i}_{t}")]
    return " ".join([*code, "}"])


@gluon.constexpr_function
def _read_constraints(fan, width, times):
    each = width + 2
    return ",".join(["=&r"] * (fan * each * times) + ["r"] * (each * times) + ["l"] * (2 * times) + ["r"] * times)


@gluon.constexpr_function
def _write_ptx(width):
    """PTX that writes a piece: its sums, the row's maximum and sum of probabilities; to two addresses; if a flag is 1.

    A NaN that came in with the inputs may have any bits; here it gets others than those of `UNWRITTEN`.
    """
    words = [f"${1 + k}" for k in range(width)]
    m, l, sums, stats, there = (f"${1 + width + k}" for k in range(5))
    code = [f"{{ .reg .pred p; .reg .b32 last, sum; .reg .b64 half0, half1; .reg {_ptx_type(width)} piece;"]
    code += [
        f"setp.ne.u32 p, {there}, 0; min.u32 last, {words[-1]}, {WRITTEN.value}; min.u32 sum, {l}, {WRITTEN.value};"
    ]
    code += [_pack("piece", [*words[:-1], "last"]), _pack("half0", [m, "sum"])]
    code += [f"@p st.relaxed.gpu.global.b64 [{stats}], half0;"]
    code += [f"@p st.relaxed.gpu.global{_ptx_type(width)} [{sums}], piece;"]
    return " ".join([*code, "mov.b32 $0, 0; }"])


@gluon.constexpr_function
def _write_constraints(width):
    return ",".join(["=r"] + ["r"] * (width + 2) + ["l", "l", "r"])


@gluon.constexpr_function
def _clear_ptx(fan, width, columns):
    """PTX that makes pieces of the first nodes unwritten; $1, $2: addresses of the first node's; $3: how many nodes."""
    code = [
        f"{{ .reg .pred p; .reg .b64 half0, half1; .reg {_ptx_type(width)} piece;",
        _pack("piece", [f"{UNWRITTEN.value}"] * width),
    ]
    code += [_pack("half0", [f"{UNWRITTEN.value}"] * 2)]
    for i in range(fan - 1):
        code += [f"setp.lt.s32 p, {i}, $3; @p st.relaxed.gpu.global{_ptx_type(width)} [$1 + {4 * columns * i}], piece;"]
        code += [f"@p st.relaxed.gpu.global.b64 [$2 + {8 * i}], half0;"]
    return " ".join([*code, "mov.b32 $0, 0; }"])


@gluon.jit
def mailbox_addresses(Partial, stats, first_row, row_nodes, tile, C: gl.constexpr):
    """Where the mailboxes of a tile's rows begin: for each group of rows that are merged at once, two tensors of
    addresses, one element a piece: of the first node's sums, and of its m and l.

    Args:
        Partial: int32: the sums of all mailboxes.
        stats: where the pairs of m and l begin.
        first_row: of the head, among the rows of all heads.
        row_nodes: mailboxes that a row has.
        tile: number of the tile among those of the head.
    """
    R: gl.constexpr = C.merge_rows
    DV: gl.constexpr = C.block_dv
    GROUPS: gl.constexpr = C.merge_groups
    WIDTH: gl.constexpr = piece_width(R, DV)
    like = split(gl.zeros([R, DV], gl.int32, rows_layout(R, DV)), WIDTH)[0]
    addresses = ()
    for g in gl.static_range(GROUPS):
        mailbox = (first_row + (tile * C.rows + g * R + _row_of(like))) * row_nodes
        sums_at = Partial + mailbox * DV + _piece_of(like) * WIDTH
        stats_at = stats + mailbox * 2 + _piece_of(like) * 0
        addresses = addresses + (sums_at.to(gl.int64), stats_at.to(gl.int64))
    return addresses


@gluon.jit
def _row_of(like):
    return gl.arange(0, like.shape[0], gl.SliceLayout(1, like.type.layout))[:, None]


@gluon.jit
def _piece_of(like):
    return gl.arange(0, like.shape[1], gl.SliceLayout(0, like.type.layout))[None, :]


@gluon.jit
def write_mailbox(own, sums_at, stats_at, node, count, C: gl.constexpr):
    """Write `own` to the mailboxes of node `node`, of the first `count` rows; the addresses are of node 0."""
    WIDTH: gl.constexpr = piece_width(C.merge_rows, C.block_dv)
    gl.inline_asm_elementwise(
        _write_ptx(WIDTH), _write_constraints(WIDTH),
        own + (sums_at + node * (4 * C.block_dv), stats_at + node * 8, (_row_of(own[0]) < count).to(gl.int32)),
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def read_mailboxes(own, sums_at, stats_at, first, own_index, count, C: gl.constexpr):
    """The `fan_in` nodes from node `first` on, of the first `count` rows, as soon as all are there that are waited for.

    Args:
        own: the node that this program has made.
        own_index: its index among the `fan_in`. Those before it are waited for, those behind it are as if they had seen
            no key.

    Returns:
        A tuple of nodes, each a tuple of its WIDTH columns' sums, m and l, all of one shape.
    """
    WIDTH: gl.constexpr = piece_width(C.merge_rows, C.block_dv)
    TIMES: gl.constexpr = _pieces_each(C.merge_rows, C.block_dv)
    FAN: gl.constexpr = C.fan_in
    read = gl.inline_asm_elementwise(
        _read_ptx(FAN, WIDTH, TIMES, C.block_dv),
        _read_constraints(FAN, WIDTH, TIMES),
        own + (
            sums_at + first * (4 * C.block_dv), stats_at + first * 8, gl.where(_row_of(own[0]) < count, own_index, 0),
        ),
        dtype=_floats(FAN * (WIDTH + 2)), is_pure=False, pack=TIMES,
    )  # fmt: skip
    nodes = ()
    for i in gl.static_range(FAN):
        nodes = nodes + (read[i * (WIDTH + 2) : (i + 1) * (WIDTH + 2)],)
    return nodes


@gluon.constexpr_function
def _floats(count):
    return (gl.float32,) * count


@gluon.jit
def clear_mailboxes(like, sums_at, stats_at, first, own_index, count, C: gl.constexpr):
    """Make what `read_mailboxes` has read unwritten again, when all threads have read it."""
    barrier()
    gl.inline_asm_elementwise(
        _clear_ptx(C.fan_in, piece_width(C.merge_rows, C.block_dv), C.block_dv), "=r,l,l,r",
        (sums_at + first * (4 * C.block_dv), stats_at + first * 8, gl.where(_row_of(like) < count, own_index, 0)),
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip

"""Partial sums that are their own flags: how programs of a Hopper decode hand them to each other through memory.

Where no program has written yet, the workspace holds `UNWRITTEN`, bits of a NaN that are never written. Whoever needs
some sums reads them until that is gone, and puts it back for the next launch. So there is no counter to be asked and no
fence to be waited for: sums are there when their bits are.

A thread merges some columns of a row that lie next to each other, its piece. A piece's sums are written and read as
one, and so are the row's maximum and its sum of probabilities: what PTX loads as a scalar, of up to 128 bits, is one
access. So one word of each is looked at. What was read needs no order among other accesses, so they are all relaxed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...runtime import workspace
from ..triton_api import barrier

UNWRITTEN = gl.constexpr(workspace.UNWRITTEN)
WRITTEN = gl.constexpr(0xFFFFFFFE)  # the most that is written, as an unsigned number


@gluon.constexpr_function
def pieces_of(rows, columns):
    """Columns that a thread has of a row, next to each other, where `rows` are merged at once."""
    return min(max(rows * columns // 128, 1), 4)


@gluon.constexpr_function
def _times(rows, columns):
    """Pieces that a thread has."""
    return max(rows * columns // 512, 1)


@gluon.constexpr_function
def rows_layout(rows, columns):
    """Of the rows [rows, columns] that 4 warps merge at once."""
    each = min(max(rows * columns // 128, 1), 4)
    lanes = min(columns // each, 32)
    row_warps = min(4, max(rows // (32 // lanes), 1))
    return gl.BlockedLayout([1, each], [32 // lanes, lanes], [row_warps, 4 // row_warps], [1, 0])


@gluon.jit
def split(x, PIECES: gl.constexpr):
    """Columns k, k + PIECES, k + 2 * PIECES, ... of x [R, DV], for each k < PIECES."""
    R: gl.constexpr = x.shape[0]
    DV: gl.constexpr = x.shape[1]
    parts = (x,)
    if PIECES == 2:
        parts = x.reshape([R, DV // 2, 2]).split()
    if PIECES == 4:
        even, odd = x.reshape([R, DV // 2, 2]).split()
        first, third = even.reshape([R, DV // 4, 2]).split()
        second, fourth = odd.reshape([R, DV // 4, 2]).split()
        parts = (first, second, third, fourth)
    return parts


@gluon.jit
def join(parts, R: gl.constexpr, DV: gl.constexpr):
    """x [R, DV], of which `split` made `parts`."""
    PIECES: gl.constexpr = len(parts)
    x = parts[0]
    if PIECES == 2:
        x = gl.join(parts[0], parts[1])
    if PIECES == 4:
        x = gl.join(gl.join(parts[0], parts[2]), gl.join(parts[1], parts[3]))
    return x.reshape([R, DV])


@gluon.constexpr_function
def _unit(pieces: int) -> str:
    """PTX type of a piece."""
    return f".b{32 * pieces}"


@gluon.constexpr_function
def _pack(unit, words):
    """PTX that makes a unit of words."""
    if len(words) == 1:
        return f"mov.b32 {unit}, {words[0]};"
    if len(words) == 2:
        return f"mov.b64 {unit}, {{{words[0]}, {words[1]}}};"
    halves = " ".join(f"mov.b64 half{i}, {{{words[2 * i]}, {words[2 * i + 1]}}};" for i in range(2))
    return f"{halves} mov.b128 {unit}, {{half0, half1}};"


@gluon.constexpr_function
def _unpack(words, unit):
    """PTX that takes a unit apart into words."""
    if len(words) == 1:
        return f"mov.b32 {words[0]}, {unit};"
    if len(words) == 2:
        return f"mov.b64 {{{words[0]}, {words[1]}}}, {unit};"
    halves = " ".join(f"mov.b64 {{{words[2 * i]}, {words[2 * i + 1]}}}, half{i};" for i in range(2))
    return f"mov.b128 {{half0, half1}}, {unit}; {halves}"


@gluon.constexpr_function
def _read_ptx(fan, pieces, times, columns):
    """PTX that reads `times` pieces of each of `fan` nodes until all are there.

    Results, each of them `times` registers: for each node a piece's sums, the row's maximum, its sum of probabilities.
    Arguments: the same of the thread's own node; addresses of the first node's sums and of its other two; the own
    node's place. Nodes before it are waited for, those behind are as if they had seen no key.
    """
    each = pieces + 2

    def result(node, k, t):
        return f"${(node * each + k) * times + t}"

    def argument(k, t):
        return f"${((fan + 1) * each - each + k) * times + t}"

    absent = ["0f00000000"] * pieces + ["0fFF800000", "0f00000000"]
    every = [(i, t) for i in range(fan) for t in range(times)]
    code = ["{ .reg .pred p, q; .reg .b32 last; .reg .b64 half0, half1;"]
    code += [f".reg .b32 word{k};" for k in range(each)]
    code += [f".reg {_unit(pieces)} sums{i}_{t}; .reg .b64 stats{i}_{t};" for i, t in every]
    words = [f"word{k}" for k in range(each)]
    for t in range(times):  # what is the own node's is there
        code += [f".reg .b32 own{k}_{t}; mov.b32 own{k}_{t}, {argument(k, t)};" for k in range(each)]
        code += [f"min.u32 own{k}_{t}, own{k}_{t}, {WRITTEN.value};" for k in (pieces - 1, each - 1)]
    for i, t in every:
        code += [f"setp.lt.s32 p, {i}, {argument(each + 2, t)}; setp.eq.s32 q, {i}, {argument(each + 2, t)};"]
        for k in range(each):
            code += [f"selp.b32 {words[k]}, own{k}_{t}, {absent[k]}, q;"]
            # What is read says by its last word whether it is there.
            code += [f"selp.b32 {words[k]}, {UNWRITTEN.value}, {words[k]}, p;"] if k in (pieces - 1, each - 1) else []
        code += [_pack(f"sums{i}_{t}", words[:pieces]), _pack(f"stats{i}_{t}", words[pieces:])]
    code += ["AGAIN:"]
    for i, t in every:
        code += [_unpack(words[:pieces], f"sums{i}_{t}"), _unpack(words[pieces:], f"stats{i}_{t}")]
        code += [
            f"setp.eq.s32 p, {words[pieces - 1]}, {UNWRITTEN.value}; setp.eq.s32 q, {words[-1]}, {UNWRITTEN.value};"
        ]
        code += [f"@p ld.relaxed.gpu.global{_unit(pieces)} sums{i}_{t}, [{argument(each, t)} + {4 * columns * i}];"]
        code += [f"@q ld.relaxed.gpu.global.b64 stats{i}_{t}, [{argument(each + 1, t)} + {8 * i}];"]
    code += ["mov.b32 last, 0;"]
    for i, t in every:
        code += [_unpack(words[:pieces], f"sums{i}_{t}"), _unpack(words[pieces:], f"stats{i}_{t}")]
        code += [f"max.u32 word0, {words[pieces - 1]}, {words[-1]}; max.u32 last, last, word0;"]
    code += [f"setp.eq.s32 p, last, {UNWRITTEN.value}; @p bra AGAIN;"]
    for i, t in every:
        results = [result(i, k, t) for k in range(each)]
        code += [_unpack(results[:pieces], f"sums{i}_{t}"), _unpack(results[pieces:], f"stats{i}_{t}")]
    return " ".join([*code, "}"])


@gluon.constexpr_function
def _read_constraints(fan, pieces, times):
    each = pieces + 2
    return ",".join(["=&r"] * (fan * each * times) + ["r"] * (each * times) + ["l"] * (2 * times) + ["r"] * times)


@gluon.constexpr_function
def _write_ptx(pieces):
    """PTX that writes a piece: its sums, the row's maximum and sum of probabilities; to two addresses; if a flag is 1.

    A NaN that came in with the inputs may have any bits; here it gets others than those of `UNWRITTEN`.
    """
    words = [f"${1 + k}" for k in range(pieces)]
    m, l, sums, stats, there = (f"${1 + pieces + k}" for k in range(5))
    code = [f"{{ .reg .pred p; .reg .b32 last, sum; .reg .b64 half0, half1; .reg {_unit(pieces)} unit;"]
    code += [
        f"setp.ne.u32 p, {there}, 0; min.u32 last, {words[-1]}, {WRITTEN.value}; min.u32 sum, {l}, {WRITTEN.value};"
    ]
    code += [_pack("unit", [*words[:-1], "last"]), _pack("half0", [m, "sum"])]
    code += [f"@p st.relaxed.gpu.global.b64 [{stats}], half0; @p st.relaxed.gpu.global{_unit(pieces)} [{sums}], unit;"]
    return " ".join([*code, "mov.b32 $0, 0; }"])


@gluon.constexpr_function
def _write_constraints(pieces):
    return ",".join(["=r"] + ["r"] * (pieces + 2) + ["l", "l", "r"])


@gluon.constexpr_function
def _clear_ptx(fan, pieces, columns):
    """PTX that makes pieces of the first nodes unwritten; $1, $2: addresses of the first node's; $3: how many nodes."""
    code = [
        f"{{ .reg .pred p; .reg .b64 half0, half1; .reg {_unit(pieces)} unit;",
        _pack("unit", [f"{UNWRITTEN.value}"] * pieces),
    ]
    code += [_pack("half0", [f"{UNWRITTEN.value}"] * 2)]
    for i in range(fan - 1):
        code += [f"setp.lt.s32 p, {i}, $3; @p st.relaxed.gpu.global{_unit(pieces)} [$1 + {4 * columns * i}], unit;"]
        code += [f"@p st.relaxed.gpu.global.b64 [$2 + {8 * i}], half0;"]
    return " ".join([*code, "mov.b32 $0, 0; }"])


@gluon.jit
def slot_addresses(Partial, stats, first_row, rows, num_lines, tile, C: gl.constexpr):
    """Where a tile's rows have their first node's sums, and where its m and l: two tensors for each of its groups.

    Args:
        first_row: of the head, among the rows of all heads.
        num_lines: nodes that a row has room for.
    """
    R: gl.constexpr = C.merge_rows
    DV: gl.constexpr = C.block_dv
    GROUPS: gl.constexpr = C.merge_groups
    PIECES: gl.constexpr = pieces_of(R, DV)
    like = split(gl.zeros([R, DV], gl.int32, rows_layout(R, DV)), PIECES)[0]
    addresses = ()
    for g in gl.static_range(GROUPS):
        line = (first_row + (tile * C.rows + g * R + _row_of(like))) * num_lines
        sums_at = Partial + line * DV + _piece_of(like) * PIECES
        stats_at = stats + line * 2 + _piece_of(like) * 0
        addresses = addresses + (sums_at.to(gl.int64), stats_at.to(gl.int64))
    return addresses


@gluon.jit
def _row_of(like):
    return gl.arange(0, like.shape[0], gl.SliceLayout(1, like.type.layout))[:, None]


@gluon.jit
def _piece_of(like):
    return gl.arange(0, like.shape[1], gl.SliceLayout(0, like.type.layout))[None, :]


@gluon.jit
def write_slot(own, sums_at, stats_at, node, count, C: gl.constexpr):
    """Write `own` as a node of the first `count` rows; the addresses are of node 0."""
    PIECES: gl.constexpr = pieces_of(C.merge_rows, C.block_dv)
    gl.inline_asm_elementwise(
        _write_ptx(PIECES), _write_constraints(PIECES),
        own + (sums_at + node * (4 * C.block_dv), stats_at + node * 8, (_row_of(own[0]) < count).to(gl.int32)),
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def read_slots(own, sums_at, stats_at, first, mine, count, C: gl.constexpr):
    """The `fan_in` nodes from `first` on, of the first `count` rows, as soon as all are there that come before `own`.

    That is the node of place `mine`; those behind it are as if they had seen no key.
    """
    PIECES: gl.constexpr = pieces_of(C.merge_rows, C.block_dv)
    TIMES: gl.constexpr = _times(C.merge_rows, C.block_dv)
    FAN: gl.constexpr = C.fan_in
    read = gl.inline_asm_elementwise(
        _read_ptx(FAN, PIECES, TIMES, C.block_dv),
        _read_constraints(FAN, PIECES, TIMES),
        own + (
            sums_at + first * (4 * C.block_dv), stats_at + first * 8, gl.where(_row_of(own[0]) < count, mine, 0),
        ),
        dtype=_floats(FAN * (PIECES + 2)), is_pure=False, pack=TIMES,
    )  # fmt: skip
    nodes = ()
    for i in gl.static_range(FAN):
        nodes = nodes + (read[i * (PIECES + 2) : (i + 1) * (PIECES + 2)],)
    return nodes


@gluon.constexpr_function
def _floats(count):
    return (gl.float32,) * count


@gluon.jit
def clear_slots(like, sums_at, stats_at, first, mine, count, C: gl.constexpr):
    """What `read_slots` has read is unwritten again, when all threads have read it."""
    barrier()
    gl.inline_asm_elementwise(
        _clear_ptx(C.fan_in, pieces_of(C.merge_rows, C.block_dv), C.block_dv), "=r,l,l,r",
        (sums_at + first * (4 * C.block_dv), stats_at + first * 8, gl.where(_row_of(like) < count, mine, 0)),
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip

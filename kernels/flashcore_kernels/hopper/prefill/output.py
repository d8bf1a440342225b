"""The end of a tile: its sums become output and log-sum-exp."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from ..rows import end_of_rows
from ..triton_api import barrier, tma_store
from .softmax import row_totals


@gluon.jit
def _normalised(acc, shrink):
    return acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def _store(head, out, r0, first_column: gl.constexpr, num_queries, output_rows, PART: gl.constexpr, C: gl.constexpr):
    """Write `out` `[rows, columns]` to the rows from r0 on of a head's output, 16 bytes a thread.

    A thread has two neighbouring columns in each eight. Four lanes exchange theirs, so that each has one eight of four.

    Args:
        head: address of the head's output.
        output_rows: an OutputRows.
        PART: 0 or 1, for acc0 or acc1.
    """
    ROWS: gl.constexpr = C.rows
    COLUMNS: gl.constexpr = out.shape[1]
    FOURS: gl.constexpr = C.output_layouts[PART][0]
    EIGHTS: gl.constexpr = C.output_layouts[PART][1]
    out = gl.convert_layout(gl.convert_layout(out, FOURS), EIGHTS)
    rows = r0 + gl.arange(0, ROWS, gl.SliceLayout(1, EIGHTS))
    columns = first_column + gl.arange(0, COLUMNS, gl.SliceLayout(0, EIGHTS))
    lines = head + rows.to(gl.int64) * (output_rows.stride_s * 8)
    there = (rows < num_queries)[:, None] & (columns < output_rows.value_eights * 8)[None, :]
    gl.store(lines[:, None] + columns[None, :], out, mask=there)


@gluon.jit
def write(acc0, acc1, m, l, tile, o0_smem, o1_smem, output_rows, call, C: gl.constexpr):
    """Normalise a tile's sums and write them, and its log-sum-exp where that is wanted.

    The copy engine leaves out rows behind the last query. Threads leave for it together, behind a barrier of their
    partition. Two consumers in one partition would wait for each other there, so they write straight from registers.

    Args:
        acc0, acc1, m, l: see Softmax, with all blocks in them.
        tile, call: a Tile, a Call.
        o0_smem, o1_smem: where the output waits for the copy engine.
        output_rows: an OutputRows with `C.one_copy`, otherwise never looked at.
    """
    ROWS: gl.constexpr = C.rows
    DV0: gl.constexpr = C.dv0
    DV1: gl.constexpr = C.dv1
    dtype: gl.constexpr = o0_smem.dtype
    num_queries = call.visibility.num_queries
    b = tile.b
    h = tile.h
    r0 = tile.r0
    l = row_totals(l, m)
    sink = m
    if C.sinks:
        sink = gl.load(call.pointers.sinks + h)
    shrink, lse = end_of_rows(m, l, sink, C)
    if C.dropout:
        shrink = shrink * call.dropout.keep_scale
    if C.lse:
        rows = r0 + gl.arange(0, ROWS, m.type.layout)
        gl.store(call.pointers.lse + tile.head_of_all.to(gl.int64) * num_queries + rows, lse, mask=rows < num_queries)
    if C.one_copy:
        head = output_rows.out + b.to(gl.int64) * output_rows.stride_b * 8
        head = head + h.to(gl.int64) * output_rows.stride_h * 8
        _store(head, _normalised(acc0, shrink).to(dtype), r0, 0, num_queries, output_rows, 0, C)
        if DV1 > 0:
            _store(head, _normalised(acc1, shrink).to(dtype), r0, DV0, num_queries, output_rows, 1, C)
    elif C.query_buffers == 1:
        HALF: gl.constexpr = DV0 // 2
        left, right = gl.split(acc0.reshape([ROWS, 2, HALF]).permute((0, 2, 1)))
        shrink = gl.convert_layout(shrink, gl.SliceLayout(1, left.type.layout))[:, None]
        for i in gl.static_range(2):
            tma.store_wait(0)  # the half before has left
            barrier()
            half = left if i == 0 else right
            o0_smem.reshape([ROWS, HALF]).store((half * shrink).to(dtype))
            fence_async_shared()
            barrier()
            tma_store(call.descriptors.o0, [b, h, r0, i * HALF], o0_smem)
    else:
        # The output takes the place of the queries, which all threads must have read.
        barrier()
        o0_smem.reshape([ROWS, DV0]).store(_normalised(acc0, shrink).to(dtype))
        if DV1 > 0:
            o1_smem.reshape([ROWS, DV1]).store(_normalised(acc1, shrink).to(dtype))
        fence_async_shared()
        barrier()
        tma_store(call.descriptors.o0, [b, h, r0, 0], o0_smem)
        if DV1 > 0:
            tma_store(call.descriptors.o1, [b, h, r0, DV0], o1_smem)


@gluon.jit
def write_packed(acc, m, l, tile, call, C: gl.constexpr):
    """`write` for packed queries: straight from registers, since other sequences' rows may follow a tile's.

    Args:
        acc, m, l: see Softmax, with all blocks in them; `C.dv1` is 0.
        tile, call: a PackedTile, and the call of a kernel for packed queries.
    """
    ROWS: gl.constexpr = C.rows
    DV: gl.constexpr = C.dv0
    PACK: gl.constexpr = C.pack
    FOURS: gl.constexpr = C.output_layouts[0][0]
    EIGHTS: gl.constexpr = C.output_layouts[0][1]
    dtype: gl.constexpr = call.buffers.k0.dtype
    pointers = call.pointers
    rows = tile.r0 + gl.arange(0, ROWS, m.type.layout)
    head = tile.unit * PACK + rows % PACK
    query = tile.m0 + rows // PACK
    l = row_totals(l, m)
    sink = m
    if C.sinks:
        sink = gl.load(pointers.sinks + head)
    shrink, lse = end_of_rows(m, l, sink, C)
    if C.lse:
        at = head.to(gl.int64) * call.visibility.num_tokens + tile.first_token + query
        gl.store(pointers.lse + at, lse, mask=query < tile.num_queries)
    out = gl.convert_layout(gl.convert_layout(_normalised(acc, shrink).to(dtype), FOURS), EIGHTS)
    rows = tile.r0 + gl.arange(0, ROWS, gl.SliceLayout(1, EIGHTS))
    columns = gl.arange(0, DV, gl.SliceLayout(0, EIGHTS))
    query = tile.m0 + rows // PACK
    head = tile.unit * PACK + rows % PACK
    line = (tile.first_token + query).to(gl.int64) * call.visibility.units * PACK + head  # of heads of all tokens
    lines = pointers.out + line * (pointers.value_eights * 8)
    there = (query < tile.num_queries)[:, None] & (columns < pointers.value_eights * 8)[None, :]
    gl.store(lines[:, None] + columns[None, :], out, mask=there)

"""The end of a tile: its sums become output and log-sum-exp."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from ..rows import end_of_rows
from ..triton_api import barrier, tma_store
from .softmax import whole_sums


@gluon.jit
def _normalised(acc, shrink):
    return acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def _store(head, out, r0, first_column: gl.constexpr, num_queries, stride_os, value_eights, PIECE: gl.constexpr,
           C: gl.constexpr):  # fmt: skip
    """Write `out` `[rows, columns]` to the rows from r0 on of a head's output, 16 bytes a thread.

    A thread has two neighbouring columns in each eight. Four lanes exchange theirs, so that each has one eight of four.
    """
    ROWS: gl.constexpr = C.rows
    COLUMNS: gl.constexpr = out.shape[1]
    FOURS: gl.constexpr = C.output_layouts[PIECE][0]
    EIGHTS: gl.constexpr = C.output_layouts[PIECE][1]
    out = gl.convert_layout(gl.convert_layout(out, FOURS), EIGHTS)
    rows = r0 + gl.arange(0, ROWS, gl.SliceLayout(1, EIGHTS))
    columns = first_column + gl.arange(0, COLUMNS, gl.SliceLayout(0, EIGHTS))
    lines = head + rows.to(gl.int64) * (stride_os * 8)
    there = (rows < num_queries)[:, None] & (columns < value_eights * 8)[None, :]
    gl.store(lines[:, None] + columns[None, :], out, mask=there)


@gluon.jit
def write(acc0, acc1, m, l, tile, descs, o_smem, output, pointers, num_queries, C: gl.constexpr):
    """Normalise and write the output, but for the rows behind the last query, which the copy engine leaves out.

    Consumers of one partition would wait for each other before that copy: they write straight from the registers.
    """
    b, h, bh, r0, begin, count, mine, left_edge, right_edge, row_lo, row_hi, holes = tile
    q0_desc, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, o0_desc, o1_desc = descs
    Lse, Range, Sinks = pointers
    o0_smem, o1_smem = o_smem
    ROWS: gl.constexpr = C.rows
    DV0: gl.constexpr = C.dv0
    DV1: gl.constexpr = C.dv1
    dtype: gl.constexpr = o0_smem.dtype
    l = whole_sums(l, m)
    sink = m
    if C.sinks:
        sink = gl.load(Sinks + h)
    shrink, lse = end_of_rows(m, l, sink, C)
    if C.lse:
        rows = r0 + gl.arange(0, ROWS, m.type.layout)
        gl.store(Lse + bh.to(gl.int64) * num_queries + rows, lse, mask=rows < num_queries)
    if C.one_copy:
        Out, stride_ob, stride_oh, stride_os, value_eights = output
        head = Out + b.to(gl.int64) * (stride_ob * 8) + h.to(gl.int64) * (stride_oh * 8)
        _store(head, _normalised(acc0, shrink).to(dtype), r0, 0, num_queries, stride_os, value_eights, 0, C)
        if DV1 > 0:
            _store(head, _normalised(acc1, shrink).to(dtype), r0, DV0, num_queries, stride_os, value_eights, 1, C)
    elif C.query_slots == 1:
        HALF: gl.constexpr = DV0 // 2
        left, right = gl.split(acc0.reshape([ROWS, 2, HALF]).permute((0, 2, 1)))
        shrink = gl.convert_layout(shrink, gl.SliceLayout(1, left.type.layout))[:, None]
        for piece in gl.static_range(2):
            tma.store_wait(0)  # the piece before has left
            barrier()
            half = left if piece == 0 else right
            o0_smem.reshape([ROWS, HALF]).store((half * shrink).to(dtype))
            fence_async_shared()
            barrier()
            tma_store(o0_desc, [b, h, r0, piece * HALF], o0_smem)
    else:
        # Until all of these queries were read.
        barrier()
        o0_smem.reshape([ROWS, DV0]).store(_normalised(acc0, shrink).to(dtype))
        if DV1 > 0:
            o1_smem.reshape([ROWS, DV1]).store(_normalised(acc1, shrink).to(dtype))
        fence_async_shared()
        barrier()
        tma_store(o0_desc, [b, h, r0, 0], o0_smem)
        if DV1 > 0:
            tma_store(o1_desc, [b, h, r0, DV0], o1_smem)

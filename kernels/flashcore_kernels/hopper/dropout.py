"""Dropout in accumulators: which weights of a block stay, by the functions of ../dropout.py that all kernels share."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .. import dropout
from .visible import sequence_bounds

# The same Python as in Triton's kernels, by Gluon's decorator: Triton's may make functions for its interpreter.
dropout_keys = gluon.jit(dropout.dropout_keys.fn)
dropout_hash = gluon.jit(dropout.dropout_hash.fn)


class Dropout(NamedTuple):
    """What a call says of dropout. Without it, integers that are never looked at.

    Attributes:
        philox: int64 `[2]` in global memory: seed and offset.
        drop_below: int32, see `drop_threshold`.
        keep_scale: fp32, what the weights that stay are multiplied by.
    """

    philox: gl.tensor
    drop_below: gl.tensor
    keep_scale: gl.tensor


class RowDropout(NamedTuple):
    """What is dropped in the rows of a tile of queries.

    Attributes:
        row_0, row_1: uint32 `[rows]`, of `dropout_keys`.
        first: the sequence's first key, from which keys are numbered.
        drop_below: see Dropout.
    """

    row_0: gl.tensor
    row_1: gl.tensor
    first: gl.tensor
    drop_below: gl.tensor


@gluon.jit
def row_dropout(tile, call, C: gl.constexpr):
    """The RowDropout of a Tile of the forward; nothing without `C.dropout`."""
    if C.dropout:
        rows = tile.r0 + gl.arange(0, C.rows, tile.row_lo.type.layout)
        row_0, row_1 = dropout_keys(call.dropout.philox, tile.head_of_all, rows)
        first = sequence_bounds(call.pointers.key_range, tile.b, call.visibility, C.range_layout).first
        return RowDropout(row_0=row_0, row_1=row_1, first=first, drop_below=call.dropout.drop_below)
    else:
        return ()


@gluon.jit
def marked(p, n, drop, C: gl.constexpr):
    """P `[rows, columns]` of the keys from n on, with a minus where a weight is dropped; P itself without `C.dropout`.

    A thread has the columns 8 * i + 2 * lane + j of its rows. Its own part of that is multiplied once, so that a column
    takes one addition of a constant to it.

    Args:
        drop: a RowDropout.
    """
    if C.dropout:
        COLUMNS: gl.constexpr = p.shape[1]
        parts = p.reshape([p.shape[0], COLUMNS // 8, 4, 2])
        LAYOUT: gl.constexpr = parts.type.layout
        ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT)))
        i = gl.arange(0, COLUMNS // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))))
        lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT))))
        j = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))))
        column = 8 * i[None, :, None, None] + j[None, None, None, :]
        keys = (n - drop.first + 2 * lane)[None, None, :, None] + column
        row_0 = gl.convert_layout(drop.row_0, ROWS)[:, None, None, None]
        row_1 = gl.convert_layout(drop.row_1, ROWS)[:, None, None, None]
        parts = minus_below(parts, dropout_hash(row_0, row_1, keys), drop.drop_below)
        p = gl.convert_layout(parts.reshape([p.shape[0], COLUMNS]), p.type.layout)
    return p


@gluon.jit
def minus_below(p, hashes, drop_below):
    """P with a minus where its hash is below `drop_below`.

    So P goes on in its registers to where it is rounded, by `stay_rounded`, and no bool for each weight beside it. In
    PTX: LLVM computes bools for all of P first, and packs them into words, bit by bit.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred drop; setp.lt.s32 drop, $2, $3; mov.f32 $0, $1; @drop neg.f32 $0, $1; }", "=&f,f,r,r",
        [p, hashes, gl.full_like(hashes, 0) + drop_below], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def computed_here(number):
    """`number`, from which nothing is computed ahead of the loop: there it would take registers all the time."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def marked_columns(p, keys, column_0, column_1, drop_below):
    """`marked` of P^T `[keys, queries]`, whose columns are queries.

    Args:
        keys: int32 `[keys]`, numbered from the sequence's first key.
        column_0, column_1: uint32 `[queries]`, of `dropout_keys`.
        drop_below: see Dropout.
    """
    return minus_below(p, dropout_hash(column_0[None, :], column_1[None, :], keys[:, None]), drop_below)


@gluon.jit
def score_gradient(p, dp, delta):
    """2 P * (what stays of dP, + delta), of P as `minus_below` leaves it: P + |P| is twice what stays of P."""
    magnitude = gl.abs(p)
    return gl.fma(p + magnitude, dp, magnitude * delta)


@gluon.jit
def stay_rounded(p, dtype: gl.constexpr):
    """Of P as `minus_below` leaves it what stays, in 16 bits: the conversion makes zeros of what is negative."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,f,f", [p], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.relu.f16x2.f32 $0, $2, $1;", "=r,f,f", [p], dtype=gl.float16, is_pure=True, pack=2
        )

"""Sums leave the registers: 16 bytes a thread, through neither shared memory nor a barrier."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def store_layouts(columns: int) -> tuple:
    """Two layouts of a consumer's `[64, columns]`: 8 bytes of a row a thread, and 16.

    Accumulators give a thread columns 8 i + 2 lane + j. From each to the next, one bit of the lane changes places with
    one of the register: exchanges within a warp, which Triton does by shuffles.
    """
    warps = [[16, 0], [32, 0]]
    rows = [[1, 0], [2, 0], [4, 0]]
    more = [[0, 1 << i] for i in range(5, columns.bit_length() - 1)]
    registers = ([[0, 1], [0, 2], [8, 0], [0, 16], *more], [[0, 1], [0, 2], [0, 4], [8, 0], *more])
    lanes = ([[0, 8], [0, 4], *rows], [[0, 8], [0, 16], *rows])
    return tuple(gl.DistributedLinearLayout(*each, warps, [], [64, columns]) for each in zip(registers, lanes))


@gluon.jit
def store_rows(head, acc, keep, r0, num_rows, strides, dtype: gl.constexpr, LAYOUTS: gl.constexpr):
    """Write `acc` `[64, columns]` to the rows from r0 on that exist, and zeros where `keep` `[64]` is false.

    Args:
        head: address of the head's row 0.
        strides: a GradientStrides.
    """
    FOURS: gl.constexpr = LAYOUTS[0]
    EIGHTS: gl.constexpr = LAYOUTS[1]
    keep = gl.convert_layout(keep, gl.SliceLayout(1, acc.type.layout))
    # Not acc * keep: a row that is not kept may hold NaN.
    out = gl.where(keep[:, None], acc, 0.0).to(dtype)
    out = gl.convert_layout(gl.convert_layout(out, FOURS), EIGHTS)
    rows = r0 + gl.arange(0, 64, gl.SliceLayout(1, EIGHTS))
    columns = gl.arange(0, acc.shape[1], gl.SliceLayout(0, EIGHTS))
    there = ((rows >= 0) & (rows < num_rows))[:, None] & (columns < strides.eights * 8)[None, :]
    gl.store(head + rows.to(gl.int64)[:, None] * (strides.stride_s * 8) + columns[None, :], out, mask=there)

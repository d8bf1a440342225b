"""What both backward kernels multiply: one consumer's products, issued and not waited for."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from ..dropout import stay_rounded
from ..rows import tanh


@gluon.jit
def product(a, b_smem, B: gl.constexpr):
    """Issue a B^T: `a` `[64, D]`, B `[B, D]`."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, B, 16])
    zero = gl.zeros([64, B], gl.float32, LAYOUT)
    return warpgroup_mma(a, b_smem.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def started_at(column_smem, B: gl.constexpr):
    """Accumulators `[64, B]` that start at a number of each column `[B]`.

    That a product starts at these costs no instruction behind it, and no register beside it.
    """
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, B, 16])
    column = column_smem.load(gl.SliceLayout(0, LAYOUT))
    start, _ = gl.broadcast(column[None, :], gl.zeros([64, B], gl.float32, LAYOUT))
    return start


@gluon.jit
def product_onto(a, b_smem, start):
    """Issue a B^T + start: `a` `[64, D]`, B `[B, D]`, `start` `[64, B]`."""
    return warpgroup_mma(a, b_smem.permute((1, 0)), start, is_async=True)


@gluon.jit
def as_operand(x, dtype: gl.constexpr, N: gl.constexpr):
    """`x` `[64, K]` in 16 bits, as the first operand of a product with `[K, N]`: it stays with its threads."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    return gl.convert_layout(x.to(dtype), gl.DotOperandLayout(0, LAYOUT, 2))


@gluon.jit
def stays_as_operand(p, dtype: gl.constexpr, N: gl.constexpr):
    """`as_operand` of what stays of P where `minus_below` has marked the rest."""
    return as_operand(stay_rounded(p, dtype), dtype, N)


@gluon.jit
def capped(s, score_scale):
    """tanh t of the scaled scores, and what its slope 1 - t^2 is."""
    t = tanh(s * score_scale)
    return t, gl.fma(gl.full_like(t, 0.0) - t, t, gl.full_like(t, 1.0))

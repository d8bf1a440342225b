"""e4m3 keys and values on their way from shared memory into wgmma: widened to fp16 in registers, its first operand.

wgmma expects certain columns of K in each thread, which do not lie together in memory. But a product does not mind the
order of what it sums over. So a thread reads bytes that do lie together, as many at once as its share of a row allows,
and calls them the columns that wgmma expects it to hold. Queries are put into the same order (`column_of`).

The same is done with the rows of V^T, which are rows of the output. Whoever reads the output knows their order
(`row_of`, `in_order`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def stored_layout(size):
    """Layout in shared memory of e4m3, `size` bytes a row: what eight lanes read at once is on different banks."""
    if size >= 128:
        return gl.SwizzledSharedLayout(16, 1, 8, [1, 0])
    return gl.SwizzledSharedLayout(16, 128 // size, size // 16, [1, 0])


@gluon.constexpr_function
def _doubling(axis, first, end):
    """Bases [0, first], [0, 2 * first], ... (axis 1; [first, 0], ... for axis 0), below `end`."""
    bases = []
    while first < end:
        bases.append([first, 0] if axis == 0 else [0, first])
        first *= 2
    return bases


@gluon.constexpr_function
def keys_layout(BN, D):
    """Layout in registers in which K [N, D] is read: a thread's columns lie together."""
    part = min(D, 128)  # columns that are permuted among themselves
    registers = _doubling(1, 1, part // 4) + _doubling(1, 128, D) + [[8, 0]] + _doubling(0, 64, BN)
    lanes = _doubling(1, part // 4, part) + [[1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [BN, D])


@gluon.constexpr_function
def values_layout(BN, DV):
    """Layout in registers in which V [N, DV] is read: a thread's columns lie together."""
    each = DV // 32
    registers = _doubling(1, 1, each) + [[1, 0]] + _doubling(0, 8, BN)
    lanes = [[2, 0], [4, 0]] + _doubling(1, each, 8 * each)
    return gl.DistributedLinearLayout(registers, lanes, _doubling(1, 8 * each, 32 * each), [], [BN, DV])


@gluon.jit
def load_keys(smem, R: gl.constexpr):
    """K [N, D] in fp16 as wgmma's first operand, its columns in the order of `column_of`."""
    BN: gl.constexpr = smem.shape[0]
    D: gl.constexpr = smem.shape[1]
    P: gl.constexpr = D if D < 128 else 128
    LAYOUT: gl.constexpr = keys_layout(BN, D)
    k = smem.load(LAYOUT).reshape([BN, D // P, 4, P // 16, 2, 2])
    k = k.permute((0, 1, 3, 4, 2, 5)).reshape([BN, D]).to(gl.float16)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16]), 2)
    return gl.convert_layout(k, OPERAND)


@gluon.jit
def column_of(d, D: gl.constexpr):
    """Which column of K (and Q) is column d of what `load_keys` returns."""
    P: gl.constexpr = D if D < 128 else 128
    sixteen = d // 16  # of the columns of one wgmma
    return sixteen // (P // 16) * P + (d // 2 % 4) * (P // 4) + sixteen % (P // 16) * 4 + (d // 8 % 2) * 2 + d % 2


@gluon.jit
def load_values(smem, R: gl.constexpr):
    """V^T [DV, N] in fp16 as wgmma's first operand, its rows in the order of `row_of`."""
    BN: gl.constexpr = smem.shape[0]
    DV: gl.constexpr = smem.shape[1]
    LAYOUT: gl.constexpr = values_layout(BN, DV)
    v = smem.load(LAYOUT).reshape([BN, 4, 8, DV // 64, 2])
    v = v.permute((3, 1, 4, 2, 0)).reshape([DV, BN]).to(gl.float16)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16]), 2)
    return gl.convert_layout(v, OPERAND)


@gluon.jit
def row_of(d, DV: gl.constexpr):
    """Which column of V is row d of what `load_values` returns."""
    return (d // 16 % 4) * (DV // 4) + d % 8 * (DV // 32) + d // 64 * 2 + d // 8 % 2


@gluon.jit
def in_order(acc):
    """acc [DV, R], whose rows lie in the order of `row_of`, in that of V's columns."""
    DV: gl.constexpr = acc.shape[0]
    R: gl.constexpr = acc.shape[1]
    return acc.reshape([DV // 64, 4, 2, 8, R]).permute((1, 3, 0, 2, 4)).reshape([DV, R])

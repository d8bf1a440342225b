"""The forward of short sequences that see all of themselves: many small programs, each for one tile of queries.

`flashcore_hopper` keeps one program on each multiprocessor, whose consumers begin a tile together and end it together.
With two to four blocks of keys a tile, its first scores and its output take as long as all the rest, and nothing runs
beside them. Here two to four programs share a multiprocessor and know nothing of each other: while one waits for its
queries or writes its output the others multiply. A program has no producer: there are so few blocks that most, or all,
are under way before the first is needed.

What is computed is `flashcore_hopper`'s to the bit, block by block.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from ..copies import release
from ..rows import end_of_rows
from ..triton_api import barrier, tma_load
from .consumer import _add_values, _no_sums, _scores
from .output import _normalised, _store
from .records import OutputRows
from .softmax import _hide_by_constants, exponents, fold_sums, maxima, rescale, row_sums, row_totals


@gluon.jit(noinline=True)
def _unseen(memory):
    """See kernel.py: between two waits Triton puts no barrier, at which the two consumers would wait for each other."""
    return memory


class _Tiles(NamedTuple):
    """As in Buffers of records.py."""

    k0: gl.shared_memory_descriptor
    k1: gl.shared_memory_descriptor
    v0: gl.shared_memory_descriptor
    v1: gl.shared_memory_descriptor


@gluon.jit
def _load(desc0, desc1, smem0, smem1, full, b, head, n, stage, D0: gl.constexpr, D1: gl.constexpr):
    """Begin to copy a tile of a tensor, in its two pieces, from row n of a head on."""
    ROWS: gl.constexpr = smem0.shape[3]
    mbarrier.expect(full.index(stage), ROWS * (D0 + D1) * 2)
    tma_load(desc0, [b, head, n, 0], full.index(stage), smem0.index(stage))
    if D1 > 0:
        tma_load(desc1, [b, head, n, D0], full.index(stage), smem1.index(stage))


@gluon.jit(
    do_not_specialize=[
        "num_heads", "group", "num_queries", "num_keys", "stride_ob", "stride_oh", "stride_os", "value_eights",
        "tiles_per_head",
    ]
)  # fmt: skip
def flashcore_hopper_short(
    q0_desc,
    q1_desc,
    k0_desc,
    k1_desc,
    v0_desc,
    v1_desc,
    Out,
    Lse,
    Sinks,
    num_heads,
    group,
    num_queries,
    num_keys,
    stride_ob,
    stride_oh,
    stride_os,
    value_eights,
    score_scale,
    cap_scale,
    tiles_per_head,
    C: gl.constexpr,
):
    """out = softmax(scale * q k^T) v over all keys, for one tile of queries of one head.

    Shapes: Q `[B, H, Q, D]`, K `[B, Hkv, K, D]` and V `[B, Hkv, K, Dv]` come as descriptors; Out `[B, H, Q, Dv]` as its
    address, its strides and value_dim in units of 8 elements; Lse `[B, H, Q]` fp32; Sinks `[H]`.
    Grid: a program a tile, `(B * H * tiles_per_head,)`.
    """
    D0: gl.constexpr = C.d0
    D1: gl.constexpr = C.d1
    DV0: gl.constexpr = C.dv0
    DV1: gl.constexpr = C.dv1
    BN: gl.constexpr = C.block_n
    STAGES: gl.constexpr = C.stages
    ROWS: gl.constexpr = C.rows
    WARPS: gl.constexpr = C.warps
    dtype: gl.constexpr = k0_desc.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    ROWS_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    # Never looked at, but there must be something.
    if D1 == 0:
        q1_desc = q0_desc
        k1_desc = k0_desc
    if DV1 == 0:
        v1_desc = v0_desc
    q0_smem = gl.allocate_shared_memory(dtype, [1, 1, 1, ROWS, D0], q0_desc.layout)
    k0_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D0], k0_desc.layout)
    v0_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, DV0], v0_desc.layout)
    q1_smem = q0_smem
    k1_smem = k0_smem
    v1_smem = v0_smem
    if D1 > 0:
        q1_smem = gl.allocate_shared_memory(dtype, [1, 1, 1, ROWS, D1], q1_desc.layout)
        k1_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D1], k1_desc.layout)
    if DV1 > 0:
        v1_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, DV1], v1_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full.index(0), count=1)
    for each in gl.static_range(STAGES):
        mbarrier.init(k_full.index(each), count=1)
        mbarrier.init(v_full.index(each), count=1)
        mbarrier.init(k_empty.index(each), count=2 * ROWS)
        mbarrier.init(v_empty.index(each), count=2 * ROWS)
    fence_async_shared()
    barrier()
    head_of_all = gl.program_id(0) // tiles_per_head
    r0 = gl.program_id(0) % tiles_per_head * ROWS
    b = head_of_all // num_heads
    h = head_of_all % num_heads
    kv_head = h // group
    blocks = (num_keys + BN - 1) // BN

    q_full = _unseen(q_full)
    k_full = _unseen(k_full)
    v_full = _unseen(v_full)
    k_empty = _unseen(k_empty)
    v_empty = _unseen(v_empty)
    q0_filled = _unseen(q0_smem)
    q1_filled = _unseen(q1_smem)
    k0_filled = _unseen(k0_smem)
    k1_filled = _unseen(k1_smem)
    v0_filled = _unseen(v0_smem)
    v1_filled = _unseen(v1_smem)
    _load(q0_desc, q1_desc, q0_filled, q1_filled, q_full, b, h, r0, 0, D0, D1)
    for each in gl.static_range(STAGES):
        if each < blocks:
            _load(k0_desc, k1_desc, k0_filled, k1_filled, k_full, b, kv_head, each * BN, each, D0, D1)
            _load(v0_desc, v1_desc, v0_filled, v1_filled, v_full, b, kv_head, each * BN, each, DV0, DV1)
    buffers = _Tiles(k0=k0_smem, k1=k1_smem, v0=v0_smem, v1=v1_smem)
    q0 = q0_smem.index(0).reshape([ROWS, D0])
    q1 = q0
    if D1 > 0:
        q1 = q1_smem.index(0).reshape([ROWS, D1])

    acc0, acc1 = _no_sums(C)
    m = gl.full([ROWS], float("-inf"), gl.float32, ROWS_LAYOUT)
    l = row_sums(gl.zeros([ROWS, BN], gl.float32, S_LAYOUT))
    mbarrier.wait(q_full.index(0), 0)
    for j in range(blocks):
        stage = j % STAGES
        phase = j // STAGES & 1
        n = j * BN
        mbarrier.wait(k_full.index(stage), phase)
        s = warpgroup_mma_wait(0, deps=[_scores(q0, q1, buffers, stage, C)])
        refill = j + STAGES < blocks
        if refill:
            release(k_empty.index(stage))
        if n + BN > num_keys:
            everything = gl.zeros([ROWS], gl.int32, ROWS_LAYOUT)
            s = _hide_by_constants(s, n, everything, everything + num_keys)
        m, alpha = maxima(s, m, score_scale)
        p = gl.exp2(exponents(s, m, score_scale))
        l = fold_sums(l, p, alpha)
        acc0 = rescale(acc0, alpha)
        if DV1 > 0:
            acc1 = rescale(acc1, alpha)
        mbarrier.wait(v_full.index(stage), phase)
        acc0, acc1 = _add_values(p, buffers, stage, acc0, acc1, C)
        if refill:
            mbarrier.wait(k_empty.index(stage), phase)
            _load(k0_desc, k1_desc, k0_filled, k1_filled, k_full, b, kv_head, n + STAGES * BN, stage, D0, D1)
        if DV1 > 0:
            acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
        else:
            acc0 = warpgroup_mma_wait(0, deps=[acc0])
        if refill:
            release(v_empty.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            _load(v0_desc, v1_desc, v0_filled, v1_filled, v_full, b, kv_head, n + STAGES * BN, stage, DV0, DV1)

    l = row_totals(l, m)
    sink = m
    if C.sinks:
        sink = gl.load(Sinks + h)
    shrink, lse = end_of_rows(m, l, sink, C)
    if C.lse:
        rows = r0 + gl.arange(0, ROWS, ROWS_LAYOUT)
        gl.store(Lse + head_of_all.to(gl.int64) * num_queries + rows, lse, mask=rows < num_queries)
    output_rows = OutputRows(
        out=Out, stride_b=stride_ob, stride_h=stride_oh, stride_s=stride_os, value_eights=value_eights
    )
    head = Out + b.to(gl.int64) * (stride_ob * 8) + h.to(gl.int64) * (stride_oh * 8)
    _store(head, _normalised(acc0, shrink).to(dtype), r0, 0, num_queries, output_rows, 0, C)
    if DV1 > 0:
        _store(head, _normalised(acc1, shrink).to(dtype), r0, DV0, num_queries, output_rows, 1, C)

"""The forward of short sequences: many small programs, each for one tile of 64 queries of one head.

`flashcore_hopper` keeps one program on each multiprocessor, whose consumers begin a tile together and end it together.
With one to four blocks of keys a tile, its first scores and its output take as long as all the rest, and nothing runs
beside them. Here several programs share a multiprocessor and know nothing of each other: while one waits for its
queries or writes its output the others multiply. A program is one warpgroup and has no producer: there are so few
blocks that most, or all, are under way before the first is needed. What a producer keeps out of V it keeps out itself.

What is computed is `flashcore_hopper`'s to the bit, block by block, so that a call's length may choose between them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from ..copies import release, scrub, unseen, write_seen_keys
from ..dropout import Dropout, marked, row_dropout
from ..query_tile import tile_of
from ..records import Heads, TilePosition
from ..triton_api import barrier, tma_load
from ..visible import FAR, Visibility, sequence_bounds
from .consumer import issue_scores, issue_values, no_sums
from .output import write
from .records import OutputRows, Pointers, ShortBuffers, ShortCall
from .softmax import exponents, fold_sums, hide, hide_by_constants, maxima, rescale, row_sums


@gluon.jit
def _load(desc, smem, full, b, head, n, stage):
    """Begin to copy a tile of a tensor, from row n of a head on."""
    ROWS: gl.constexpr = smem.shape[3]
    COLUMNS: gl.constexpr = smem.shape[4]
    mbarrier.expect(full.index(stage), ROWS * COLUMNS * 2)
    tma_load(desc, [b, head, n, 0], full.index(stage), smem.index(stage))


@gluon.jit
def _clean_keys(b, call):
    """(lo, hi, any_key) as in the producer: values outside of [lo, hi) may be NaN and, with `any_key`, any key's."""
    visibility = call.visibility
    bounds = sequence_bounds(call.pointers.key_range, b, visibility, 1)
    lo = gl.maximum(bounds.first, bounds.start - bounds.left)
    hi = gl.minimum(bounds.end, bounds.start + visibility.num_queries + bounds.right)
    return lo, hi, bounds.holes != 0


@gluon.jit
def _clean_blocks(b, call):
    """(lo, hi): blocks that begin at lo or later and end at hi or sooner have no values that may be NaN."""
    num_keys = call.visibility.num_keys
    lo, hi, any_key = _clean_keys(b, call)
    # The copy engine itself gives zeros behind the last key.
    return gl.where(any_key, FAR, lo), gl.where(hi < num_keys, hi, FAR)


@gluon.jit
def _scrub_values(n, stage, b, call, C: gl.constexpr):
    """Zero those rows of a block of values that has arrived whose keys no query sees. All threads take part."""
    BN: gl.constexpr = C.block_n
    Range = call.pointers.key_range
    keep = call.buffers.keep
    lo, hi, any_key = _clean_keys(b, call)  # again: a few loads, for a few registers in all other blocks
    if any_key:
        write_seen_keys(Range, keep, b, 0, n, lo, hi, call.visibility, C.rows, BN, 1, C.warps)
    values = call.buffers.v0.index(stage).reshape([BN, C.dv0])
    scrub(values, keep, n, lo, hi, any_key, BN, C.dv0, C.warps)
    fence_async_shared()
    barrier()


@gluon.jit(
    do_not_specialize=[
        "num_heads", "group", "num_queries", "num_keys", "stride_rb", "stride_ob", "stride_oh", "stride_os",
        "value_eights", "tiles_per_head", "drop_below",
    ]
)  # fmt: skip
def flashcore_hopper_short(
    q_desc,
    k_desc,
    v_desc,
    Out,
    Lse,
    Range,
    Philox,
    num_heads,
    group,
    num_queries,
    num_keys,
    stride_rb,
    stride_ob,
    stride_oh,
    stride_os,
    value_eights,
    score_scale,
    tiles_per_head,
    drop_below,
    keep_scale,
    C: gl.constexpr,
):
    """out = softmax(scale * q k^T) v for one tile of queries, over all keys or those of a KeyRange.

    Shapes: Q `[B, H, Q, D]`, K `[B, Hkv, K, D]` and V `[B, Hkv, K, Dv]` come as descriptors; Out `[B, H, Q, Dv]` as its
    address, its strides and value_dim in units of 8 elements; Lse `[B, H, Q]` fp32; Range a KeyRange with a line a
    sequence; Philox int64 `[2]` and two numbers, see Dropout. `C.d1` and `C.dv1` are 0; there is neither softcap nor
    sinks nor mask.
    Grid: a program a tile, `(B * H * tiles_per_head,)`.
    """
    D: gl.constexpr = C.d0
    DV: gl.constexpr = C.dv0
    BN: gl.constexpr = C.block_n
    STAGES: gl.constexpr = C.stages
    ROWS: gl.constexpr = C.rows
    dtype: gl.constexpr = k_desc.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [C.warps, 1], [16, BN, 16])
    ROWS_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    # Never looked at, but each field of a record needs a value.
    if not C.lse:
        Lse = num_heads
    if C.range_layout == 0:
        Range = num_heads
    if not C.dropout:
        Philox = num_heads
        drop_below = num_heads
        keep_scale = num_heads
    q_smem = gl.allocate_shared_memory(dtype, [1, 1, 1, ROWS, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, DV], v_desc.layout)
    keep_smem = v_smem
    if C.range_layout == 1:
        keep_smem = gl.allocate_shared_memory(gl.int32, [BN], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
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
    b = head_of_all // num_heads
    h = head_of_all % num_heads
    kv_head = h // group
    tile_number = gl.program_id(0) % tiles_per_head

    q_full = unseen(q_full)
    k_full = unseen(k_full)
    v_full = unseen(v_full)
    k_empty = unseen(k_empty)
    v_empty = unseen(v_empty)
    q_filled = unseen(q_smem)
    k_filled = unseen(k_smem)
    v_filled = unseen(v_smem)
    _load(q_desc, q_filled, q_full, b, h, tile_number * ROWS, 0)
    call = ShortCall(
        buffers=ShortBuffers(k0=k_smem, v0=v_smem, keep=keep_smem),
        pointers=Pointers(lse=Lse, key_range=Range, sinks=num_heads),
        heads=Heads(num_heads=num_heads, group=group),
        visibility=Visibility(
            num_queries=num_queries, num_keys=num_keys, query_start=num_keys * 0, window_left=num_keys * 0 - 1,
            window_right=num_keys * 0 - 1, stride_rb=stride_rb, stride_rs=stride_rb,
        ),
        dropout=Dropout(philox=Philox, drop_below=drop_below, keep_scale=keep_scale),
    )  # fmt: skip
    tile = tile_of(TilePosition(b=b, h=h, tile=tile_number), call, 0, C)
    for each in gl.static_range(STAGES):
        if each < tile.own_blocks:
            _load(k_desc, k_filled, k_full, b, kv_head, tile.begin + each * BN, each)
            _load(v_desc, v_filled, v_full, b, kv_head, tile.begin + each * BN, each)
    clean_from = num_keys * 0
    clean_to = clean_from
    if C.range_layout == 1:
        clean_from, clean_to = _clean_blocks(b, call)

    q = q_smem.index(0).reshape([ROWS, D])
    acc, acc1 = no_sums(C)
    drop = row_dropout(tile, call, C)
    m = gl.full([ROWS], float("-inf"), gl.float32, ROWS_LAYOUT)
    l = row_sums(gl.zeros([ROWS, BN], gl.float32, S_LAYOUT))
    mbarrier.wait(q_full.index(0), 0)
    for j in range(tile.own_blocks):
        stage = j % STAGES
        phase = j // STAGES & 1
        n = tile.begin + j * BN
        refill = j + STAGES < tile.own_blocks
        if C.range_layout == 1:
            # Here, where no scores take registers. Of such blocks a sequence has one, and its V arrives with its K.
            if (n < clean_from) | (n + BN > clean_to):
                mbarrier.wait(v_full.index(stage), phase)
                _scrub_values(n, stage, b, call, C)
        mbarrier.wait(k_full.index(stage), phase)
        s = warpgroup_mma_wait(0, deps=[issue_scores(q, q, call.buffers, stage, C)])
        if refill:
            release(k_empty.index(stage))
        if (j < tile.left_edge) | (j >= tile.right_edge):
            if C.range_layout == 1:
                s = hide(s, n, tile, Range, call.visibility, C)
            else:  # the bounds of single rows take registers
                everything = gl.zeros([ROWS], gl.int32, ROWS_LAYOUT)
                s = hide_by_constants(s, n, everything, everything + num_keys)
        m, alpha = maxima(s, m, score_scale)
        p = gl.exp2(exponents(s, m, score_scale))
        l = fold_sums(l, p, alpha)
        p = marked(p, n, drop, C)
        acc = rescale(acc, alpha)
        mbarrier.wait(v_full.index(stage), phase)
        acc, acc1 = issue_values(p, call.buffers, stage, acc, acc1, C)
        if refill:
            mbarrier.wait(k_empty.index(stage), phase)
            _load(k_desc, k_filled, k_full, b, kv_head, n + STAGES * BN, stage)
        acc = warpgroup_mma_wait(0, deps=[acc])
        if refill:
            release(v_empty.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            _load(v_desc, v_filled, v_full, b, kv_head, n + STAGES * BN, stage)
    output_rows = OutputRows(
        out=Out, stride_b=stride_ob, stride_h=stride_oh, stride_s=stride_os, value_eights=value_eights
    )
    write(acc, acc1, m, l, tile, q_smem, q_smem, output_rows, call, C)

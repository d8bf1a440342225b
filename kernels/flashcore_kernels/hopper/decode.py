"""Split-KV decode in Gluon for compute capability 9.0: keys and values fly to shared memory before anything else.

The contract is that of the portable `flashcore_decode`: a sequence's visible keys are cut into chunks, a function of
that sequence's own length alone; the last program of a KV head merges them in the order of the chunks.

The products are transposed, because wgmma has 64 rows and a decode call has few queries: S^T [keys, rows] = K Q^T and
O^T [values, rows] = V^T P^T, with K and V^T from shared memory and 8 rows at the least. K and V come by cp.async, not
by the tensor copy engine: it takes any strides without a descriptor made on the host, and leaves zeros in the place of
keys that are not to be seen, whose values may be NaN.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .decode_merge import merge, write_rows
from .decode_tiles import copy_keys, fold_scores, load_queries, widen
from .triton_api import barrier
from .visible import BITMAP, sequence_bounds


@dataclass(frozen=True)
class DecodeConfig:
    """Everything that one compiled kernel is made for.

    Attributes:
        head_dim, value_dim: of a row of K and of V.
        block_d, block_dv: the same, padded to powers of two.
        key_step, value_step: elements from a key to the next, where every address of a block is then one register and
            a constant; 0: only known at run time.
        num_kv_heads, group: heads of K and V, and query heads for each.
        rows: of a tile (query tokens x group), a power of two from 8.
        row_tiles: tiles that a KV head's rows take.
        block_n: keys of a block.
        stages: blocks of K and V in shared memory.
        min_chunk, max_splits: least keys of a chunk, most chunks of a sequence (a power of two).
        may_split: False: no sequence can have more than one chunk, and there is no workspace.
        merge_rows, merge_splits: rows that are merged at once, and chunks whose sums are read at once.
        fp8: K and V are e4m3, with a scale for each sequence and KV head; they are multiplied as fp16.
        range, softcap, sinks, lse: whether there are any.
    """

    head_dim: int
    value_dim: int
    block_d: int
    block_dv: int
    key_step: int
    value_step: int
    num_kv_heads: int
    group: int
    rows: int
    row_tiles: int
    block_n: int
    stages: int
    min_chunk: int
    max_splits: int
    may_split: bool
    merge_rows: int
    merge_splits: int
    fp8: bool
    range: bool
    softcap: bool
    sinks: bool
    lse: bool


@gluon.jit
def _attend(smem, heads, keys, row_lo, row_hi, score_scale, unit, C: gl.constexpr):
    """(acc^T [DV, R], m [R], l [R]) of one chunk. Its first blocks are on their way already."""
    BN: gl.constexpr = C.block_n
    S: gl.constexpr = C.stages
    R: gl.constexpr = C.rows
    DV: gl.constexpr = C.block_dv
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])
    k_smem, v_smem, q_smem, p_smem, k_wide, v_wide = smem
    k_head, v_head, stride_ks, stride_vs = heads
    n, n_end, bitmap, holes = keys
    acc = gl.zeros([DV, R], gl.float32, LAYOUT)
    sums = gl.zeros([BN, R], gl.float32, LAYOUT)  # of the probabilities, not yet over the keys of a block
    m = gl.full([R], float("-inf"), gl.float32, gl.SliceLayout(0, LAYOUT))
    q = q_smem.permute((1, 0))  # [D, R]
    p_t = p_smem.permute((1, 0))  # [N, R]
    # A sequence without keys has one block, of zeros.
    for j in range(gl.maximum((n_end - n + BN - 1) // BN, 1)):
        stage = j % S
        coming = n + S * BN  # the block that takes this one's place
        async_copy.wait_group(2 * S - 1)
        k = k_smem.index(stage)
        v = v_smem.index(stage)
        k_source = k
        v_source = v
        if C.fp8:
            barrier()
            widen(k, k_wide)
            k_source = k_wide
            v_source = v_wide
        fence_async_shared()
        barrier()
        s = warpgroup_mma(k_source, q, gl.zeros([BN, R], gl.float32, LAYOUT), use_acc=False, is_async=True)
        if C.fp8:
            # Every warp has read this block's keys.
            if coming < n_end:
                copy_keys(k, k_head, stride_ks, coming, n_end, bitmap, holes, C, C.head_dim, C.key_step)
            async_copy.commit_group()
            async_copy.wait_group(2 * S - 1)
            barrier()
            widen(v, v_wide)
        s = warpgroup_mma_wait(0, deps=[s])
        p, acc, m, sums = fold_scores(s, acc, m, sums, n, n_end, row_lo, row_hi, bitmap, holes, score_scale, unit, C)
        p_t.store(p.to(p_smem.dtype))
        if not C.fp8:
            async_copy.wait_group(2 * S - 2)
        fence_async_shared()
        barrier()
        acc = warpgroup_mma(v_source.permute((1, 0)), p_t, acc, is_async=True)
        # Every warp is done with this block's keys, and has read its values where they are e4m3.
        if coming < n_end:
            if C.fp8:
                copy_keys(v, v_head, stride_vs, coming, n_end, bitmap, holes, C, C.value_dim, C.value_step)
            else:
                copy_keys(k, k_head, stride_ks, coming, n_end, bitmap, holes, C, C.head_dim, C.key_step)
        async_copy.commit_group()
        acc = warpgroup_mma_wait(0, deps=[acc])
        if not C.fp8:
            if coming < n_end:
                barrier()
                copy_keys(v, v_head, stride_vs, coming, n_end, bitmap, holes, C, C.value_dim, C.value_step)
            async_copy.commit_group()
        n += BN
    return acc, m, gl.sum(sums, axis=0)


_NOT_SPECIALIZED = [
    "num_queries", "num_keys", "query_start", "window_left", "window_right", "num_splits", "stride_qb", "stride_qh",
    "stride_qs", "stride_kb", "stride_kh", "stride_ks", "stride_vb", "stride_vh", "stride_vs", "stride_rb",
]  # fmt: skip


@gluon.jit(do_not_specialize=_NOT_SPECIALIZED)
def flashcore_hopper_decode(
    Q,
    K,
    V,
    Out,
    Lse,
    Range,
    Sinks,
    KeyScale,
    ValueScale,
    Partial,
    Count,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_rb,
    num_queries,
    num_keys,
    query_start,
    window_left,
    window_right,
    num_splits,
    score_scale,
    cap_scale,
    C: gl.constexpr,
):
    """out = softmax(cap(scale * q k^T)) v over the keys that each query sees, chunk by chunk.

    Shapes: as `flashcore_decode`, but that Out's heads lie inside the sequence in memory, and strides of Q, K and V are
    in units of 16 bytes; Partial's lines are in the order of sequence, KV head, row and chunk.
    Grid: `(num_splits * B * Hkv * row_tiles,)`; programs beyond a sequence's own number of chunks leave at once.
    """
    BN: gl.constexpr = C.block_n
    S: gl.constexpr = C.stages
    R: gl.constexpr = C.rows
    D: gl.constexpr = C.block_d
    DV: gl.constexpr = C.block_dv
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])
    dtype: gl.constexpr = K.dtype.element_ty
    VEC: gl.constexpr = 128 // dtype.primitive_bitwidth
    rows = num_queries * C.group
    pid = gl.program_id(0)
    unit = pid // num_splits
    split = pid - unit * num_splits
    head_unit = unit // C.row_tiles
    tile = unit % C.row_tiles
    b = head_unit // C.num_kv_heads
    kv_head = head_unit % C.num_kv_heads

    numbers = (num_keys, num_keys, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rb)
    if not C.range:  # never looked at, but each place in a tuple needs a value
        Range = num_keys
    first, end, start, left, right, holes = sequence_bounds(Range, b, numbers, 1 if C.range else 0)
    lo = gl.maximum(first, start - left)
    hi = gl.maximum(gl.minimum(end, start + num_queries + right), lo)
    # Multiples of 32 keys, so that lengths close to each other are cut alike.
    chunk = gl.maximum(((hi - lo + C.max_splits - 1) // C.max_splits + 31) // 32 * 32, C.min_chunk)
    # One chunk at least: somebody has to write the zeros of a sequence without keys.
    n_begin = lo + split * chunk
    if (split == 0) | (n_begin < hi):
        wide: gl.constexpr = gl.float16 if C.fp8 else dtype
        K_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], wide)
        V_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, DV], wide)
        # Swizzled as wgmma wants it; e4m3, which wgmma never sees, row after row.
        ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        k_smem = gl.allocate_shared_memory(dtype, [S, BN, D], ROWS if C.fp8 else K_LAYOUT)
        v_smem = gl.allocate_shared_memory(dtype, [S, BN, DV], ROWS if C.fp8 else V_LAYOUT)
        q_smem = gl.allocate_shared_memory(wide, [R, D], gl.NVMMASharedLayout.get_default_for([R, D], wide))
        p_smem = gl.allocate_shared_memory(wide, [R, BN], gl.NVMMASharedLayout.get_default_for([R, BN], wide))
        k_wide = k_smem
        v_wide = v_smem
        if C.fp8:
            k_wide = gl.allocate_shared_memory(wide, [BN, D], K_LAYOUT)
            v_wide = gl.allocate_shared_memory(wide, [BN, DV], V_LAYOUT)
        n_end = gl.minimum(n_begin + chunk, hi)
        k_head = K + (b.to(gl.int64) * stride_kb + kv_head.to(gl.int64) * stride_kh) * VEC
        v_head = V + (b.to(gl.int64) * stride_vb + kv_head.to(gl.int64) * stride_vh) * VEC
        bitmap = Range
        if C.range:
            bitmap = Range + b.to(gl.int64) * stride_rb + BITMAP

        # First of all the keys. The queries stand in the same group of copies, and hide behind them.
        for i in gl.static_range(S):
            n = n_begin + i * BN
            if (i == 0) | (n < n_end):
                copy_keys(k_smem.index(i), k_head, stride_ks, n, n_end, bitmap, holes, C, C.head_dim, C.key_step)
            if i == 0:
                if not C.fp8:
                    load_queries(q_smem, Q, b, kv_head, tile * R, rows, stride_qb, stride_qh, stride_qs, C)
            async_copy.commit_group()
            if (i == 0) | (n < n_end):
                copy_keys(v_smem.index(i), v_head, stride_vs, n, n_end, bitmap, holes, C, C.value_dim, C.value_step)
            async_copy.commit_group()
        if C.fp8:
            load_queries(q_smem, Q, b, kv_head, tile * R, rows, stride_qb, stride_qh, stride_qs, C)
            scales = b.to(gl.int64) * C.num_kv_heads + kv_head
            score_scale *= gl.load(KeyScale + scales)
            value_scale = gl.load(ValueScale + scales)

        r = tile * R + gl.arange(0, R, gl.SliceLayout(0, LAYOUT))
        token = r // C.group
        row_lo = gl.maximum(first, start + token - left)
        row_hi = gl.minimum(end, start + token + right + 1)
        acc, m, l = _attend(
            (k_smem, v_smem, q_smem, p_smem, k_wide, v_wide), (k_head, v_head, stride_ks, stride_vs),
            (n_begin, n_end, bitmap, holes), row_lo, row_hi, score_scale, cap_scale if C.softcap else score_scale, C,
        )  # fmt: skip
        if C.fp8:
            acc *= value_scale
        async_copy.wait_group(0)

        d = gl.arange(0, DV, gl.SliceLayout(1, LAYOUT))
        if hi - lo <= chunk:
            write_rows(acc, m, l, r, d, Out, Lse, Sinks, b, kv_head, num_queries, 1, C)
        else:
            if C.may_split:
                all_rows = (gl.num_programs(0) // C.row_tiles).to(gl.int64) * rows  # B * Hkv * num_splits * rows
                stats = Partial + all_rows * DV
                head_line = head_unit.to(gl.int64) * num_splits * rows
                line = head_line + r.to(gl.int64) * num_splits + split
                gl.store(Partial + line[None, :] * DV + d[:, None], acc, mask=(r < rows)[None, :])
                gl.store(stats + line * 2, m, mask=r < rows)
                gl.store(stats + line * 2 + 1, l, mask=r < rows)
                # Every thread's stores must stand before the one thread that counts says that they do.
                barrier()
                used = (hi - lo + chunk - 1) // chunk
                if gl.atomic_add(Count + unit, 1, sem="acq_rel", scope="gpu") == used - 1:
                    gl.store(Count + unit, 0)
                    for r0 in range(tile * R, gl.minimum((tile + 1) * R, rows), C.merge_rows):
                        all_acc, all_m, all_l = merge(Partial, stats, head_line, r0, rows, used, num_splits, C)
                        some = r0 + gl.arange(0, C.merge_rows, all_m.type.layout)
                        columns = gl.arange(0, DV, gl.SliceLayout(0, all_acc.type.layout))
                        write_rows(
                            all_acc, all_m, all_l, some, columns, Out, Lse, Sinks, b, kv_head, num_queries, 0, C
                        )  # fmt: skip

"""Split-KV decode in Gluon for compute capability 9.0: keys and values fly to shared memory before anything else.

The contract is that of the portable `flashcore_decode`: a sequence's visible keys are cut into chunks by that
sequence's own length alone, and the order in which chunks are merged depends on nothing else. Here the order is a
binary tree over the chunks' numbers, so that who merges does not matter. A program may take 2, 4 or 8 chunks in a row
and merge them itself, which spares a batch most of the partial sums. Of every `fan_in` neighbours the last one merges
the others, until one is left.

The products are transposed, because wgmma has 64 rows and a decode call has few queries: S^T [keys, rows] = K Q^T and
O^T [values, rows] = V^T P^T, with K and V^T from shared memory and 8 rows at the least.

K and V come by cp.async, not by the tensor copy engine. It takes any strides without a descriptor made on the host, and
it leaves zeros in the place of keys that are not to be seen, whose values may be NaN.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from ..records import ScoreFactors
from ..triton_api import barrier
from ..visible import BITMAP, Visibility, sequence_bounds
from .fp8 import in_order, load_keys, load_values, row_of, stored_layout
from .mailboxes import mailbox_addresses
from .merge import merge_nodes, push, unstack, write_rows
from .records import Answer, Bitmap, Block, Buffers, KeysAndValues, Partials, Queries, RowLimits, Sums
from .tiles import bring_keys, bring_values, fold_scores, load_queries, next_block


@dataclass(frozen=True)
class DecodeConstants:
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
        resident: programs that an SM is to have registers for.
        min_chunk, max_splits: least keys of a chunk, most chunks of a sequence (a power of two).
        may_split: False: every sequence is one program's in each KV head, and there is no workspace.
        levels: of the tree that a program can merge by itself: it takes up to 2**levels chunks.
        in_a_row: the programs of one tile are numbered in a row; otherwise those of the same chunks of all tiles are.
        fan_in: neighbours that are merged by the last of them, a power of two from 4.
        merge_rows, merge_groups: rows that are merged at once, and how often that is done for a tile.
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
    resident: int
    min_chunk: int
    max_splits: int
    may_split: bool
    levels: int
    in_a_row: bool
    fan_in: int
    merge_rows: int
    merge_groups: int
    fp8: bool
    range: bool
    softcap: bool
    sinks: bool
    lse: bool

    @property
    def paged(self) -> bool:
        """Whether keys lie in pages, see hopper/paged/."""
        return False


@gluon.jit
def _attend(buffers, head, block, coming, chunk, end, limits, bitmap, score_scale, to_log2, C: gl.constexpr):
    """The Sums of all chunks of a program, its keys [block.n, end). Each chunk's own start from zero.

    The copies of its first blocks are under way. They go on across chunks, always as many blocks ahead.

    Args:
        head: as in `serve_rows`.
        block: the program's first Block.
        coming: the first Block whose copy has not begun: it takes the buffer of the first.
        chunk: keys of a chunk.
        limits, bitmap, score_scale, to_log2: see `fold_scores`.
    """
    BN: gl.constexpr = C.block_n
    S: gl.constexpr = C.stages
    R: gl.constexpr = C.rows
    DV: gl.constexpr = C.block_dv
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])
    acc = gl.zeros([DV, R], gl.float32, LAYOUT)
    sums = gl.zeros([BN, R], gl.float32, LAYOUT)  # of the probabilities, not yet over the keys of a block
    m = gl.full([R], float("-inf"), gl.float32, gl.SliceLayout(0, LAYOUT))
    q = buffers.q.permute((1, 0))  # [D, R]
    p_t = buffers.p.permute((1, 0))  # [N, R]
    LEVELS: gl.constexpr = C.levels
    stack = ()
    for _ in gl.static_range(LEVELS):
        stack = stack + (Sums(acc=acc, m=m, l=m),)
    number = block.n * 0  # of the chunk
    blocks = (end - block.n + BN - 1) // BN
    if LEVELS > 0:
        full_chunks = (end - block.n) // chunk
        blocks = full_chunks * ((chunk + BN - 1) // BN) + (end - block.n - full_chunks * chunk + BN - 1) // BN
    # A sequence without keys has one block, of zeros.
    for j in range(gl.maximum(blocks, 1)):
        stage = j % S
        async_copy.wait_group(2 * S - 1)
        k = buffers.k.index(stage)
        v = buffers.v.index(stage)
        if C.fp8:
            barrier()
            s = warpgroup_mma(load_keys(k, R), q, gl.zeros([BN, R], gl.float32, LAYOUT), use_acc=False, is_async=True)
            barrier()
            # Every warp has read this block's keys.
            if coming.n < end:
                bring_keys(k, head, coming, bitmap, C)
            async_copy.commit_group()
            async_copy.wait_group(2 * S - 1)
            barrier()
            v_operand = load_values(v, R)
        else:
            fence_async_shared()
            barrier()
            s = warpgroup_mma(k, q, gl.zeros([BN, R], gl.float32, LAYOUT), use_acc=False, is_async=True)
            v_operand = v.permute((1, 0))
        s = warpgroup_mma_wait(0, deps=[s])
        p, acc, m, sums = fold_scores(s, acc, m, sums, block, limits, bitmap, score_scale, to_log2, C)
        p_t.store(p.to(buffers.p.dtype))
        if not C.fp8:
            async_copy.wait_group(2 * S - 2)
        fence_async_shared()
        barrier()
        acc = warpgroup_mma(v_operand, p_t, acc, is_async=True)
        # Every warp is done with this block's keys, and has read its values where they are e4m3.
        if coming.n < end:
            if C.fp8:
                bring_values(v, head, coming, bitmap, C)
            else:
                bring_keys(k, head, coming, bitmap, C)
        async_copy.commit_group()
        acc = warpgroup_mma_wait(0, deps=[acc])
        if not C.fp8:
            if coming.n < end:
                barrier()
                bring_values(v, head, coming, bitmap, C)
            async_copy.commit_group()
        coming = next_block(coming, chunk, end, C)
        after = next_block(block, chunk, end, C)
        if LEVELS > 0:
            if (after.n == block.end) & (after.n < end):
                stack = push(stack, Sums(acc=acc, m=m, l=gl.sum(sums, axis=0)), number, C)
                acc = gl.zeros([DV, R], gl.float32, LAYOUT)
                sums = gl.zeros([BN, R], gl.float32, LAYOUT)
                m = gl.full([R], float("-inf"), gl.float32, gl.SliceLayout(0, LAYOUT))
                number += 1
        block = after
    return unstack(stack, Sums(acc=acc, m=m, l=gl.sum(sums, axis=0)), number, C)


@gluon.jit
def serve_rows(head, bounds, bitmap, queries, answer, partial, tile, head_of_all, split, factors, C: gl.constexpr):
    """What a program does: attend a tile of rows to its share of a sequence's keys, write the answer or merge it.

    Args:
        head: KeysAndValues of the KV head, or with pages PagedKeysAndValues.
        bounds: the sequence's SequenceBounds.
        bitmap: a Bitmap.
        queries: Queries.
        answer: an Answer.
        partial: Partials.
        tile: number of the tile among those of the KV head.
        head_of_all: number of the KV head among those of all sequences.
        split: number of the program among those of the tile.
        factors: ScoreFactors.
    """
    BN: gl.constexpr = C.block_n
    S: gl.constexpr = C.stages
    R: gl.constexpr = C.rows
    D: gl.constexpr = C.block_d
    DV: gl.constexpr = C.block_dv
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])
    dtype: gl.constexpr = head.k.dtype.element_ty
    num_queries = answer.num_queries
    rows = num_queries * C.group
    first, end, start, left, right, holes = bounds
    chunks_each = partial.chunks_each
    score_scale = factors.score_scale
    lo = gl.maximum(first, start - left)
    hi = gl.maximum(gl.minimum(end, start + num_queries + right), lo)
    # Multiples of 32 keys, so that lengths close to each other are cut alike.
    chunk = gl.maximum(((hi - lo + C.max_splits - 1) // C.max_splits + 31) // 32 * 32, C.min_chunk)
    # One chunk at least: somebody has to write the zeros of a sequence without keys.
    n_begin = lo + split * chunks_each * chunk
    if (split == 0) | (n_begin < hi):
        wide: gl.constexpr = gl.float16 if C.fp8 else dtype
        K_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], wide)
        V_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, DV], wide)
        # Swizzled as wgmma wants it, or for the threads, who widen e4m3.
        k_smem = gl.allocate_shared_memory(dtype, [S, BN, D], stored_layout(D) if C.fp8 else K_LAYOUT)
        v_smem = gl.allocate_shared_memory(dtype, [S, BN, DV], stored_layout(DV) if C.fp8 else V_LAYOUT)
        q_smem = gl.allocate_shared_memory(wide, [R, D], gl.NVMMASharedLayout.get_default_for([R, D], wide))
        p_smem = gl.allocate_shared_memory(wide, [R, BN], gl.NVMMASharedLayout.get_default_for([R, BN], wide))
        buffers = Buffers(k=k_smem, v=v_smem, q=q_smem, p=p_smem)
        chunk_end = gl.minimum(n_begin + chunk, hi)
        program_end = chunk_end
        if C.levels > 0:
            program_end = gl.minimum(n_begin + chunks_each * chunk, hi)

        # First of all the keys. The queries stand in the same group of copies, and hide behind them.
        block = Block(n=n_begin, end=chunk_end)
        coming = block
        for i in gl.static_range(S):
            if (i == 0) | (coming.n < program_end):
                bring_keys(k_smem.index(i), head, coming, bitmap, C)
            if i == 0:
                if not C.fp8:
                    load_queries(q_smem, queries, answer.kv_head, tile * R, rows, C)
            async_copy.commit_group()
            if (i == 0) | (coming.n < program_end):
                bring_values(v_smem.index(i), head, coming, bitmap, C)
            async_copy.commit_group()
            coming = next_block(coming, chunk, program_end, C)
        if C.fp8:
            load_queries(q_smem, queries, answer.kv_head, tile * R, rows, C)
            fence_async_shared()
            score_scale *= gl.load(queries.key_scale)
            value_scale = gl.load(queries.value_scale)

        r = tile * R + gl.arange(0, R, gl.SliceLayout(0, LAYOUT))
        token = r // C.group
        row_lo = gl.maximum(first, start + token - left)
        row_hi = gl.minimum(end, start + token + right + 1)
        all_lo = gl.maximum(first, start + num_queries - 1 - left)
        all_hi = gl.minimum(end, start + right + 1)
        limits = RowLimits(row_lo=row_lo, row_hi=row_hi, all_lo=all_lo, all_hi=all_hi)
        nodes = 1
        addresses = ()
        if C.may_split:
            nodes = (hi - lo + chunks_each * chunk - 1) // (chunks_each * chunk)
            all_heads = gl.num_programs(1 if C.in_a_row else 0) // C.row_tiles
            sums_at = partial.words
            stats = sums_at + all_heads.to(gl.int64) * rows * partial.row_nodes * DV
            addresses = mailbox_addresses(sums_at, stats, head_of_all.to(gl.int64) * rows, partial.row_nodes, tile, C)
        to_log2 = factors.cap_scale if C.softcap else score_scale
        sums = _attend(buffers, head, block, coming, chunk, program_end, limits, bitmap, score_scale, to_log2, C)
        if C.fp8:
            sums = Sums(acc=sums.acc * value_scale, m=sums.m, l=sums.l)
        async_copy.wait_group(0)

        d = gl.arange(0, DV, gl.SliceLayout(1, LAYOUT))
        if C.fp8:
            d = row_of(d, DV)
        if nodes <= 1:
            write_rows(sums, r, d, answer, C)
        elif C.may_split:
            in_columns = Sums(acc=in_order(sums.acc) if C.fp8 else sums.acc, m=sums.m, l=sums.l)
            merge_nodes(in_columns, addresses, answer, tile, split, nodes, partial.num_splits, C)


_NOT_SPECIALIZED = [
    "num_queries", "num_keys", "query_start", "window_left", "window_right", "num_splits", "chunks_each", "row_nodes",
    "stride_qb", "stride_qh", "stride_qs", "stride_kb", "stride_kh", "stride_ks", "stride_vb", "stride_vh", "stride_vs",
    "stride_rb",
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
    chunks_each,
    row_nodes,
    score_scale,
    cap_scale,
    C: gl.constexpr,
):
    """out = softmax(cap(scale * q k^T)) v over the keys that each query sees, chunk by chunk.

    Shapes: as `flashcore_decode`, but that Out's heads lie inside the sequence in memory, and that strides of Q, K and
    V are in units of 16 bytes.
    Partial: unwritten mailboxes (see mailboxes.py) in the order of sequence, KV head, row and node of the tree. A row
    has `row_nodes`: num_splits that programs make themselves, and those that are made of others. First come the sums
    of all mailboxes, then their pairs of m and l.
    Grid: `(tiles, num_splits)`, for the tiles of rows of all sequences and KV heads; `(num_splits, tiles)` where the
    programs of a tile are numbered in a row. Programs beyond a sequence's own number of chunks leave at once. The
    others take `chunks_each` chunks, a power of two up to 2**levels.
    """
    VEC: gl.constexpr = 128 // K.dtype.element_ty.primitive_bitwidth
    tile_of_all = gl.program_id(1 if C.in_a_row else 0)
    split = gl.program_id(0 if C.in_a_row else 1)
    head_of_all = tile_of_all // C.row_tiles
    tile = tile_of_all % C.row_tiles
    b = head_of_all // C.num_kv_heads
    kv_head = head_of_all % C.num_kv_heads

    # Never looked at, but each field of a record needs a value.
    if not C.range:
        Range = num_keys
    if not C.lse:
        Lse = num_keys
    if not C.sinks:
        Sinks = num_keys
    if not C.may_split:
        Partial = num_keys
    # There is no KeyRange here with a line a query, and so no stride of it.
    visibility = Visibility(
        num_queries=num_queries, num_keys=num_keys, query_start=query_start, window_left=window_left,
        window_right=window_right, stride_rb=stride_rb, stride_rs=None,
    )  # fmt: skip
    bounds = sequence_bounds(Range, b, visibility, 1 if C.range else 0)
    words = Range
    if C.range:
        words = Range + b.to(gl.int64) * stride_rb + BITMAP
    key_scale = num_keys
    value_scale = num_keys
    if C.fp8:
        scales = b.to(gl.int64) * C.num_kv_heads + kv_head
        key_scale = KeyScale + scales
        value_scale = ValueScale + scales
    k_head = K + (b.to(gl.int64) * stride_kb + kv_head.to(gl.int64) * stride_kh) * VEC
    v_head = V + (b.to(gl.int64) * stride_vb + kv_head.to(gl.int64) * stride_vh) * VEC
    serve_rows(
        KeysAndValues(k=k_head, v=v_head, stride_ks=stride_ks, stride_vs=stride_vs), bounds,
        Bitmap(words=words, holes=bounds.holes),
        Queries(
            q=Q, b=b, stride_b=stride_qb, stride_h=stride_qh, stride_s=stride_qs, key_scale=key_scale,
            value_scale=value_scale,
        ),
        Answer(out=Out, lse=Lse, lse_stride=num_queries, sinks=Sinks, b=b, kv_head=kv_head, num_queries=num_queries),
        Partials(words=Partial, num_splits=num_splits, chunks_each=chunks_each, row_nodes=row_nodes), tile,
        head_of_all, split, ScoreFactors(score_scale=score_scale, cap_scale=cap_scale), C,
    )  # fmt: skip

"""What the Hopper decode does with a tile: bring it to shared memory, widen e4m3, hide keys, fold scores into sums."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..rows import tanh
from ..triton_api import copy_async
from .fp8 import column_of
from .records import Block


@gluon.jit
def copy_keys(smem, base, stride, block, bitmap, C: gl.constexpr, SIZE: gl.constexpr, STEP: gl.constexpr):
    """Start copying a block's keys, or their values; zeros behind the end of its chunk, and where no key exists.

    Addresses are made in three dimensions `[TIMES, KEYS, columns]`. Along the first a thread has all indices, so its
    addresses are one register and constants.

    Args:
        smem: `[BN, D]`, or with DV.
        base, stride: of K or V, see KeysAndValues.
        block, bitmap: a Block, a Bitmap.
        SIZE: columns that there are in memory.
        STEP: elements from a key to the next; 0: only `stride` says it.
    """
    n = block.n
    BN: gl.constexpr = smem.shape[0]
    BLOCK: gl.constexpr = smem.shape[1]
    VEC: gl.constexpr = 128 // smem.dtype.primitive_bitwidth
    LANES: gl.constexpr = BLOCK // VEC if BLOCK // VEC < 32 else 32
    KEYS: gl.constexpr = 128 // LANES  # that all threads copy at once
    TIMES: gl.constexpr = BN // KEYS
    ALL: gl.constexpr = gl.BlockedLayout([TIMES, 1, VEC], [1, 32 // LANES, LANES], [1, 4, 1], [2, 1, 0])
    time = gl.arange(0, TIMES, gl.SliceLayout(1, gl.SliceLayout(2, ALL)))[:, None]
    key = gl.arange(0, KEYS, gl.SliceLayout(0, gl.SliceLayout(2, ALL)))[None, :]
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(1, ALL)))[None, :]
    column = gl.expand_dims(column, 1)
    keys = n + key + time * KEYS
    there = keys < block.end
    if STEP > 0:
        at = gl.expand_dims(key * STEP, 2) + column + gl.expand_dims(time * (KEYS * STEP), 2)
        at = base + n.to(gl.int64) * STEP + at
    else:
        # A product of two ints of 32 bits is one instruction, of 64 bits four.
        step = stride.to(gl.int64)
        at = gl.expand_dims(key.to(gl.int64) * step * VEC, 2) + column
        at = base + n.to(gl.int64) * step * VEC + at + gl.expand_dims(time * (step * (KEYS * VEC)), 2)
    # Reshaping forgets that rows are multiples of 16 bytes.
    at = gl.max_contiguous(gl.multiple_of(at.reshape([BN, BLOCK]), [1, 16]), [1, VEC])
    mask = gl.expand_dims(there, 2) & (column < SIZE)
    # Two copies, so that the one without holes has no mask in registers.
    if bitmap.holes != 0 if C.range else False:
        word = gl.load(bitmap.words + (keys >> 5), mask=there, other=0)
        exist = gl.expand_dims(((word >> (keys & 31)) & 1) == 1, 2) & mask
        copy_async(smem, at, mask=gl.max_constancy(exist.reshape([BN, BLOCK]), [1, VEC]))
    else:
        copy_async(smem, at, mask=gl.max_constancy(mask.reshape([BN, BLOCK]), [1, VEC]))


@gluon.jit
def _copy_out_of_pages(
    smem, base, stride, stride_page, new, head, block, C: gl.constexpr, SIZE: gl.constexpr, STEP: gl.constexpr
):  # fmt: skip
    """`copy_keys` where keys lie in pages.

    Args:
        base, stride, stride_page, new: of K or V, see PagedKeysAndValues.
        head: PagedKeysAndValues.
    """
    n = block.n
    BN: gl.constexpr = smem.shape[0]
    BLOCK: gl.constexpr = smem.shape[1]
    PAGE_SIZE: gl.constexpr = C.page_size
    RING: gl.constexpr = C.ring
    VEC: gl.constexpr = 128 // smem.dtype.primitive_bitwidth
    LANES: gl.constexpr = BLOCK // VEC if BLOCK // VEC < 32 else 32
    KEYS: gl.constexpr = 128 // LANES
    TIMES: gl.constexpr = BN // KEYS
    ALL: gl.constexpr = gl.BlockedLayout([TIMES, 1, VEC], [1, 32 // LANES, LANES], [1, 4, 1], [2, 1, 0])
    time = gl.arange(0, TIMES, gl.SliceLayout(1, gl.SliceLayout(2, ALL)))[:, None]
    key = gl.arange(0, KEYS, gl.SliceLayout(0, gl.SliceLayout(2, ALL)))[None, :]
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(1, ALL)))[None, :]
    column = gl.expand_dims(column, 1)
    keys = n + key + time * KEYS
    there = keys < block.end
    if STEP > 0:
        step = stride.to(gl.int64) * 0 + STEP
    else:
        step = stride.to(gl.int64) * VEC
    page_step = stride_page.to(gl.int64) * VEC
    if PAGE_SIZE >= BN and RING % PAGE_SIZE == 0:
        # A block lies on two pages at the most: two looks for all threads, and one of two addresses for each key.
        slot = n % RING if RING > 0 else n
        entry = slot // PAGE_SIZE
        after = entry + 1
        if RING > 0:
            after = gl.where(after * PAGE_SIZE < RING, after, 0)
        row = slot - entry * PAGE_SIZE
        some = n < block.end
        page = _page(head, entry, some)
        next_page = _page(head, after, n + PAGE_SIZE - row < block.end)
        this = base + page.to(gl.int64) * page_step + row.to(gl.int64) * step
        that = base + next_page.to(gl.int64) * page_step + (row - PAGE_SIZE).to(gl.int64) * step
        if STEP > 0:
            offsets = key * STEP + time * (KEYS * STEP)
        else:
            offsets = key.to(gl.int64) * step + time * (step * KEYS)
        at = gl.where(keys - n < PAGE_SIZE - row, this, that) + offsets
    else:
        stored = there & (keys < head.past) if C.new_keys else there
        slot = keys % RING if RING > 0 else keys
        entry = slot // PAGE_SIZE
        page = _page(head, entry, stored)
        at = base + page.to(gl.int64) * page_step + (slot - entry * PAGE_SIZE).to(gl.int64) * step
    if C.new_keys:
        at = gl.where(keys < head.past, at, new)
    at = gl.expand_dims(at, 2) + column
    # Reshaping forgets that rows are multiples of 16 bytes.
    at = gl.max_contiguous(gl.multiple_of(at.reshape([BN, BLOCK]), [1, 16]), [1, VEC])
    mask = gl.expand_dims(there, 2) & (column < SIZE)
    copy_async(smem, at, mask=gl.max_constancy(mask.reshape([BN, BLOCK]), [1, VEC]))


@gluon.jit
def _page(head, entry, there):
    """The pages at these entries of a sequence's line of the table."""
    # Clamped, so that wrong lengths or a wrong table can show wrong keys but never make a program read outside.
    page = gl.load(head.table + gl.minimum(entry, head.width - 1), mask=there, other=0)
    return gl.minimum(gl.maximum(page, 0), head.num_pages - 1)


@gluon.jit
def bring_keys(smem, head, block, bitmap, C: gl.constexpr):
    """Start copying a block's keys to smem `[BN, D]`. For head see `serve_rows`."""
    if C.paged:
        _copy_out_of_pages(
            smem, head.k, head.stride_ks, head.stride_kp, head.new_k, head, block, C, C.head_dim, C.key_step
        )
    else:
        copy_keys(smem, head.k, head.stride_ks, block, bitmap, C, C.head_dim, C.key_step)


@gluon.jit
def bring_values(smem, head, block, bitmap, C: gl.constexpr):
    """Start copying a block's values to smem `[BN, DV]`. For head see `serve_rows`."""
    if C.paged:
        _copy_out_of_pages(
            smem, head.v, head.stride_vs, head.stride_vp, head.new_v, head, block, C, C.value_dim, C.value_step
        )
    else:
        copy_keys(smem, head.v, head.stride_vs, block, bitmap, C, C.value_dim, C.value_step)


@gluon.jit
def next_block(block, chunk, end, C: gl.constexpr):
    """The Block behind this one: in the same chunk, or in the next of a program whose keys end at `end`.

    Args:
        chunk: keys of a chunk.
    """
    n = block.n
    n_end = block.end
    if C.levels == 0:  # a program has one chunk
        n += C.block_n
    else:
        n = gl.minimum(n + C.block_n, n_end)
        n_end = gl.where(n == n_end, gl.minimum(n_end + chunk, end), n_end)
    return Block(n=n, end=n_end)


@gluon.jit
def load_queries(q_smem, queries, kv_head, r0, rows, C: gl.constexpr):
    """Bring rows [r0, r0 + R) of a KV head to shared memory: by a copy, or as fp16 beside fp8 keys."""
    R: gl.constexpr = C.rows
    D: gl.constexpr = C.block_d
    LANES: gl.constexpr = D // 8 if D < 256 else 32
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    r = r0 + gl.arange(0, R, gl.SliceLayout(1, LAYOUT))
    d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    stride_h = queries.stride_h
    head = queries.q + (queries.b.to(gl.int64) * queries.stride_b + (kv_head * C.group).to(gl.int64) * stride_h) * 8
    at = ((r % C.group).to(gl.int64) * stride_h + (r // C.group).to(gl.int64) * queries.stride_s) * 8
    if C.fp8:
        d = column_of(d, D)
    mask = (r < rows)[:, None] & (d < C.head_dim)[None, :]
    if C.fp8:
        q_smem.store(gl.load(head + at[:, None] + d[None, :], mask=mask, other=0.0).to(gl.float16))
    else:
        copy_async(q_smem, head + at[:, None] + d[None, :], mask=mask)


@gluon.jit
def _hide(s, block, limits, bitmap, C: gl.constexpr):
    """A block's scores s [N, R], with -inf where a row does not see a key."""
    keys = block.n + gl.arange(0, s.shape[0], gl.SliceLayout(1, s.type.layout))
    there = keys < block.end
    if C.range:
        if bitmap.holes != 0:
            word = gl.load(bitmap.words + (keys >> 5), mask=there, other=0)
            there = there & (((word >> (keys & 31)) & 1) == 1)
    see = there[:, None] & (keys[:, None] >= limits.row_lo[None, :]) & (keys[:, None] < limits.row_hi[None, :])
    return gl.where(see, s, float("-inf"))


@gluon.jit
def fold_scores(s, acc, m, sums, block, limits, bitmap, score_scale, to_log2, C: gl.constexpr):
    """Fold a block's scores s [N, R] into the sums of its chunk.

    Args:
        acc, m, sums: [DV, R], maxima [R] in units of log2, [N, R]: probabilities, of each index in a block.
        block, limits, bitmap: a Block, RowLimits, a Bitmap.
        score_scale: scores are multiplied by it before softcap's tanh, otherwise it is not looked at.
        to_log2: factor that leaves scores in units of log2.

    Returns:
        The probabilities [N, R]; acc as it must be for them, their product with V not yet in it; m and sums.
    """
    if C.softcap:
        s = tanh(s * score_scale)
    n = block.n
    if (n < limits.all_lo) | (n + s.shape[0] > gl.minimum(block.end, limits.all_hi)) | (bitmap.holes != 0):
        s = _hide(s, block, limits, bitmap, C)
    m_new = gl.maximum(m, gl.max(s, axis=0) * to_log2)
    # A row that has seen no key yet has m = -inf, and -inf - -inf is NaN.
    m_finite = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(gl.fma(s, gl.full_like(s, 0.0) + to_log2, gl.full_like(s, 0.0) - m_finite[None, :]))
    alpha = gl.exp2(m - m_finite)
    sums = gl.fma(sums, gl.full_like(s, 0.0) + alpha[None, :], p)
    return p, acc * alpha[None, :], m_new, sums

"""The producer warp: it brings Q, and K and V out of their pages, to shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..copies import scrub
from ..packed import packed_blocks, told_position, window
from ..triton_api import PUBLIC_REINTERPRET, barrier, tma_load

# With how many blocks left to fetch a program asks for its next tile: it is found by looks at all sequences.
ASK_BLOCKS = gl.constexpr(8)


@gluon.jit
def look_up(line, n, num_keys, table, C: gl.constexpr):
    """The pages of keys [n, n + BN), one for each box of a block: a tuple. num_pages, which is none, behind the end."""
    PAGE_SIZE: gl.constexpr = C.page_size
    pages = ()
    for i in gl.static_range(C.block_n // C.box):
        key = n + i * C.box
        entry = key // PAGE_SIZE
        pages = pages + (
            gl.load(line + entry, mask=(key < num_keys) & (entry < table.width), other=table.num_pages),
        )  # fmt: skip
    return pages


@gluon.jit
def copy_block(descriptor, smem, full, pages, row, kv_head, C: gl.constexpr, COLUMNS: gl.constexpr):
    """Start copying a block of keys, or of values, to `smem` `[1, 1, BN, COLUMNS]`, as many boxes as there are pages.

    Args:
        pages: see `look_up`.
        row: of the first key within the first page: the others begin at a page's first key.
    """
    BN: gl.constexpr = C.block_n
    BOXES: gl.constexpr = BN // C.box
    mbarrier.expect(full, BN * COLUMNS * 2)
    if BOXES == 1:
        tma_load(descriptor, [pages[0], kv_head, row, 0], full, smem)
    else:
        # A row's 128 bytes are what is swizzled: behind each other lie the first 64 columns of all rows, then the next.
        if PUBLIC_REINTERPRET:
            boxes = smem.reinterpret(smem.dtype, [BOXES * COLUMNS // 64, 1, 1, C.box, 64], descriptor.layout)
        else:
            boxes = smem._reinterpret(smem.dtype, [BOXES * COLUMNS // 64, 1, 1, C.box, 64], descriptor.layout)
        for i in gl.static_range(BOXES):
            for column in gl.static_range(COLUMNS // 64):
                tma_load(descriptor, [pages[i], kv_head, row, column * 64], full, boxes.index(column * BOXES + i))


@gluon.jit
def produce(call, C: gl.constexpr):
    """The producer warp: copies Q once a tile, K and V block by block, ahead of the consumers."""
    D: gl.constexpr = C.d0
    DV: gl.constexpr = C.dv0
    BN: gl.constexpr = C.block_n
    STAGES: gl.constexpr = C.stages
    QUERY_BUFFERS: gl.constexpr = C.query_buffers
    ROWS: gl.constexpr = C.rows
    PARTITIONS: gl.constexpr = 64 * C.consumers // ROWS
    TOKENS: gl.constexpr = 64 * C.consumers // C.pack
    PAGE_SIZE: gl.constexpr = C.page_size
    descriptors = call.descriptors
    buffers = call.buffers
    barriers = call.barriers
    packed = call.visibility
    table = call.table
    left, right = window(packed)
    position = told_position(call.queue, 0, 1)
    tiles_done = 0
    use = 0
    scrubs = 0
    while position.tile >= 0:
        kv_head = position.unit // table.units_each
        m0 = position.tile * TOKENS
        num_keys = position.num_keys
        start = num_keys - position.num_queries
        begin, count = packed_blocks(position, packed, C)
        line = table.entries + position.sequence.to(gl.int64) * table.stride
        # Values of keys outside of [clean_lo, clean_hi) may be NaN.
        clean_lo = gl.maximum(start - left, 0)
        clean_hi = gl.minimum(start + position.num_queries + right, num_keys)
        # Early where a consumer may have far fewer blocks than another: see prefill/producer.py.
        ask_at = gl.where(m0 + TOKENS <= position.num_queries, gl.maximum(count - ASK_BLOCKS, 0), 0)
        for c in gl.static_range(PARTITIONS):
            buffer = c * QUERY_BUFFERS + tiles_done % QUERY_BUFFERS
            mbarrier.wait(barriers.q_empty.index(buffer), (tiles_done // QUERY_BUFFERS & 1) ^ 1)
            q_full = barriers.q_full.index(buffer)
            mbarrier.expect(q_full, ROWS * D * 2)
            first = position.first_token + m0 + c * (ROWS // C.pack)
            tma_load(descriptors.q, [position.unit, first, 0, 0], q_full, buffers.q0.index(buffer))
        for j in range(count):
            n = begin + j * BN
            # The pages stand in front of the wait, which hides the time that they take.
            pages = look_up(line, n, num_keys, table, C)
            row = n % PAGE_SIZE if C.box == BN else 0
            stage = use % STAGES
            phase = use // STAGES & 1
            mbarrier.wait(barriers.k_empty.index(stage), phase ^ 1)
            copy_block(descriptors.k, buffers.k0.index(stage), barriers.k_full.index(stage), pages, row, kv_head, C, D)
            mbarrier.wait(barriers.v_empty.index(stage), phase ^ 1)
            if (n < clean_lo) | (n + BN > clean_hi):
                copy_block(descriptors.v, buffers.v0.index(stage), barriers.v_raw, pages, row, kv_head, C, DV)
                mbarrier.wait(barriers.v_raw, scrubs & 1)
                scrubs += 1
                values = buffers.v0.index(stage).reshape([BN, DV])
                scrub(values, buffers.keep, n, clean_lo, clean_hi, False, BN, DV)
                fence_async_shared()
                barrier()
                mbarrier.arrive(barriers.v_full.index(stage), count=1)
            else:
                copy_block(
                    descriptors.v, buffers.v0.index(stage), barriers.v_full.index(stage), pages, row, kv_head, C, DV
                )
            use += 1
            if j == ask_at:
                mbarrier.arrive(call.queue.asked, count=1)
        tiles_done += 1
        position = told_position(call.queue, tiles_done, 1)

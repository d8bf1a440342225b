"""Blocks come from global memory, and what nobody sees of them is zeroed on the way: 0 * NaN would be NaN."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..copies import scrub
from ..triton_api import barrier, tma_load


@gluon.jit
def load_block(desc, b, head, n, smem, full, scrubs, dirty, clean, call, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Copy a block of a head's rows `[ROWS, COLUMNS]`, and zero those that may be NaN before saying that it is full.

    Args:
        n: the block's first row.
        scrubs: how many blocks were scrubbed before: the phase of `raw` follows from it.
        dirty: whether this one is to be.
        clean: a CleanRows.

    Returns:
        scrubs with this block.
    """
    raw = call.barriers.raw
    if dirty:
        mbarrier.expect(raw, ROWS * COLUMNS * 2)
        tma_load(desc, [b, head, n, 0], raw, smem)
        mbarrier.wait(raw, scrubs & 1)
        block = smem.reshape([ROWS, COLUMNS])
        scrub(block, call.buffers.keep, n, clean.lo, clean.hi, clean.any, ROWS, COLUMNS)
        fence_async_shared()
        barrier()
        mbarrier.arrive(full, count=1)
    else:
        mbarrier.expect(full, ROWS * COLUMNS * 2)
        tma_load(desc, [b, head, n, 0], full, smem)
    return scrubs + dirty.to(gl.int32)

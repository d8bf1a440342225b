"""The Hopper forward of prompts whose keys lie in pages: the prefill's consumers behind a producer for pages.

A block of keys comes out of one page, or, where pages are smaller, box by box out of several. The rest is what
`flashcore_hopper` does, with blocks on the same grid and softmax by the same code: a sequence's bits are the same.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..packed import POSITION_WORDS, POSITIONS, Packed, hand_out_packed
from ..prefill.consumer import consume
from ..prefill.kernel import PrefillConstants
from ..prefill.records import Barriers, Buffers
from ..records import Queue, ScoreFactors
from ..triton_api import SHARED_WORKER_ARGUMENTS
from .producer import produce
from .records import Descriptors, PagedCall, Pointers, Table


@dataclass(frozen=True)
class PagedConstants(PrefillConstants):
    """Everything that one compiled kernel is made for: PrefillConstants of two consumers and whole heads, and

    Attributes:
        pack: query heads of one KV head that lie in a tile beside each other, a power of two up to 64.
        page_size: keys of a page, a power of two.
        cumulative: whether key lengths come as sums.
    """

    pack: int = 1
    page_size: int = 256
    cumulative: bool = False

    @property
    def packed(self) -> bool:
        return True

    @property
    def box(self) -> int:
        """Keys that one copy brings."""
        return min(self.page_size, self.block_n)


@gluon.jit
def _consumer_0(call, C: gl.constexpr):
    consume(0, call, (), C)


@gluon.jit
def _consumer_1(call, C: gl.constexpr):
    consume(1, call, (), C)


_NOT_SPECIALIZED = [
    "num_sequences", "num_tokens", "units", "units_each", "window_left", "window_right", "stride_table", "table_width",
    "num_pages", "value_eights",
]  # fmt: skip


@gluon.jit(do_not_specialize=_NOT_SPECIALIZED)
def flashcore_hopper_paged(
    q_desc,
    k_desc,
    v_desc,
    Out,
    Lse,
    Pages,
    CuQ,
    Lengths,
    Sinks,
    Counter,
    num_sequences,
    num_tokens,
    units,
    units_each,
    window_left,
    window_right,
    stride_table,
    table_width,
    num_pages,
    value_eights,
    score_scale,
    cap_scale,
    C: gl.constexpr,
):
    """out = softmax(cap(scale * q k^T) + mask) v, for the queries of sequences that have not one query but several.

    Shapes: Q `[T, H, D]` and the pools of K and V come as descriptors, see `records.Descriptors`. Out `[T, H, Dv]`,
    contiguous; Lse `[H, T]` fp32; Pages int32 `[S, W]`; CuQ int32 `[S + 1]`; Lengths int32 `[S]`, or sums `[S + 1]`;
    Sinks `[H]`; Counter an int32 that is 0, and 0 again at the end. What is padding of T gets zeros.
    Grid: as many programs as run at once, or as there are tiles at the most. The launch's warps are those of the first
    consumer; the other partitions add theirs.
    """
    BN: gl.constexpr = C.block_n
    STAGES: gl.constexpr = C.stages
    ROWS: gl.constexpr = C.rows
    QUERIES: gl.constexpr = 2 * C.query_buffers  # buffers, of both partitions
    dtype: gl.constexpr = q_desc.dtype
    # Never looked at, but each field of a record needs a value.
    if not C.lse:
        Lse = num_tokens
    if not C.sinks:
        Sinks = num_tokens
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, BN, C.d0], dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, BN, C.dv0], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [QUERIES, 1, ROWS // C.pack, C.pack, C.d0], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, C.d0], k_layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, C.dv0], v_layout)
    keep_smem = gl.allocate_shared_memory(gl.int32, [BN], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    q_full = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_raw = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    words: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    positions = gl.allocate_shared_memory(gl.int32, [POSITIONS * POSITION_WORDS, 1], words)
    position_full = gl.allocate_shared_memory(gl.int64, [POSITIONS, 1], mbarrier.MBarrierLayout())
    position_asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(QUERIES):
        mbarrier.init(q_full.index(buffer), count=1)
        mbarrier.init(q_empty.index(buffer), count=2 * ROWS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=256)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=256)
    mbarrier.init(v_raw, count=1)
    for entry in gl.static_range(POSITIONS):
        mbarrier.init(position_full.index(entry), count=1)
    mbarrier.init(position_asked, count=1)
    fence_async_shared()
    buffers = Buffers(
        q0=q_smem, q1=q_smem, k0=k_smem, k1=k_smem, v0=v_smem, v1=v_smem, keep=keep_smem, o0=q_smem, mask=q_smem
    )
    barriers = Barriers(
        q_full=q_full, q_empty=q_empty, k_full=k_full, k_empty=k_empty, v_full=v_full, v_empty=v_empty, v_raw=v_raw,
        mask_full=v_raw, mask_empty=v_raw,
    )  # fmt: skip
    queue = Queue(positions=positions, full=position_full, asked=position_asked, counter=Counter)
    packed = Packed(
        cu_queries=CuQ, lengths=Lengths, num_sequences=num_sequences, num_tokens=num_tokens, units=units,
        window_left=window_left, window_right=window_right,
    )  # fmt: skip
    table = Table(entries=Pages, stride=stride_table, width=table_width, num_pages=num_pages, units_each=units_each)
    pointers = Pointers(out=Out, value_eights=value_eights, lse=Lse, key_range=num_tokens, sinks=Sinks)
    call = PagedCall(
        descriptors=Descriptors(q=q_desc, k=k_desc, v=v_desc), buffers=buffers, barriers=barriers, queue=queue,
        pointers=pointers, visibility=packed, factors=ScoreFactors(score_scale=score_scale, cap_scale=cap_scale),
        table=table,
    )  # fmt: skip
    if SHARED_WORKER_ARGUMENTS:
        gl.warp_specialize(
            (call, C), _consumer_0,
            (call, C), [_consumer_1, produce, hand_out_packed],
            [4, 1, 1], [C.consumer_registers, C.producer_registers, C.producer_registers],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer_0, (call, C)),
                (_consumer_1, (call, C)),
                (produce, (call, C)),
                (hand_out_packed, (call, C)),
            ],
            [4, 1, 1], [C.consumer_registers, C.producer_registers, C.producer_registers],
        )  # fmt: skip

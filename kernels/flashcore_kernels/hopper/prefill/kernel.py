"""The Hopper forward in Gluon: a scheduler and a producer warp, two or three consumer warpgroups of 64 queries each.

The producer brings Q, K and V to shared memory with the bulk tensor copy engine. Each consumer computes, for its
queries, S = Q K^T of one block while the softmax of the block before and its product P V are under way; P never leaves
the registers. Programs are persistent: the scheduler draws one tile after the other (`schedule`), and the producer is
already at the next one while the consumers finish one.

A block costs the time from its scores to the next ones. Along it the two consumers must keep the tensor cores busy for
each other, so the loop has no barrier that can be left out:
- a consumer's threads arrive each for itself, by `async_copy.mbarrier_arrive`: Triton puts a barrier of the warpgroup
  before its own `mbarrier.arrive`, and none before this;
- sums stay with the threads until the end of a tile;
- sums of earlier blocks are rescaled only where a maximum grew by much.

Each consumer is a partition with machine code of its own, or two are one partition and share one copy (`one_copy`):
with two copies short tiles wait for instructions a good part of their time. The two consumers of a partition are never
to wait for each other, unless they take turns. So Triton must put no barrier into their loop (see `copies.unseen`), and
their output leaves without the copy engine.

Barriers in shared memory come in pairs: `full` (data has arrived) and `empty` (the consumers are done with it). Both
sides count their uses; use u of a buffer of N stages is stage u % N in phase u // N % 2.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..copies import unseen
from ..dropout import Dropout
from ..records import Heads, Queue, ScoreFactors, TileOrder
from ..schedule import hand_out
from ..triton_api import SHARED_WORKER_ARGUMENTS
from ..visible import Visibility
from .consumer import consume
from .masks import BIAS, BIAS_ROW, NO_MASK
from .producer import produce
from .records import Barriers, Buffers, Call, DenseMask, Descriptors, OutputRows, Pointers


@dataclass(frozen=True)
class PrefillConstants:
    """Everything that one compiled kernel is made for.

    Attributes:
        d0, d1, dv0, dv1: columns of the two tiles that rows of Q and K, and of V, are cut into: powers of two, the
            second may be 0.
        block_n: keys of a block.
        consumers: warpgroups, of 64 queries each.
        stages: blocks of K and V in shared memory.
        range_layout: 0 no KeyRange, 1 a line a sequence, 2 a line a query.
        softcap, sinks, lse: whether there are any.
        query_buffers, scores_ahead, short_masks: as in PrefillRow.
        consumer_registers, producer_registers: of a thread.
        one_copy: both consumers are one partition and run one copy of the machine code.
        turns: such consumers take turns in issuing the products of a block.
        mask: NO_MASK, BOOL, BIAS or BIAS_ROW of masks.py.
        dropout: whether there is any; then there is no mask.
    """

    d0: int
    d1: int
    dv0: int
    dv1: int
    block_n: int
    consumers: int
    stages: int
    range_layout: int
    softcap: bool
    sinks: bool
    lse: bool
    query_buffers: int
    scores_ahead: bool
    short_masks: bool
    consumer_registers: int
    producer_registers: int
    one_copy: bool
    turns: bool
    mask: int = 0
    dropout: bool = False

    @property
    def packed(self) -> bool:
        """Whether sequences of any lengths follow each other in one dimension, see packed.py."""
        return False

    @property
    def from_registers(self) -> bool:
        """Whether the output leaves without the copy engine, and so without a buffer."""
        return self.one_copy or self.packed

    @property
    def warps(self) -> int:
        """Warps of a consumers' partition."""
        return 4 * self.consumers if self.one_copy else 4

    @property
    def rows(self) -> int:
        """Queries of a consumers' partition."""
        return 16 * self.warps

    @property
    def output_layouts(self) -> tuple:
        """For each of the output's two tiles `[rows, columns]` two layouts: 8 bytes of a row a thread, and 16.

        In the accumulators' layout a thread has columns 8 i + 2 lane + j. From each layout to the next, one bit of the
        lane changes places with one of the register. Triton does that by shuffles within a warp.
        """
        warps = [[16 << i, 0] for i in range(self.warps.bit_length() - 1)]
        rows = [[1, 0], [2, 0], [4, 0]]
        layouts = []
        for columns in filter(None, (self.dv0, self.dv1)):
            more = [[0, 1 << i] for i in range(5, columns.bit_length() - 1)]
            registers = ([[0, 1], [0, 2], [8, 0], [0, 16], *more], [[0, 1], [0, 2], [0, 4], [8, 0], *more])
            lanes = ([[0, 8], [0, 4], *rows], [[0, 8], [0, 16], *rows])
            shape = [self.rows, columns]
            layouts.append(tuple(gl.DistributedLinearLayout(*each, warps, [], shape) for each in zip(registers, lanes)))
        return tuple(layouts)


@gluon.jit
def _both_consumers(call, output_rows, C: gl.constexpr):
    consume(0, call, output_rows, C)


@gluon.jit
def _consumer_0(call, C: gl.constexpr):
    consume(0, call, (), C)


@gluon.jit
def _consumer_1(call, C: gl.constexpr):
    consume(1, call, (), C)


@gluon.jit
def _consumer_2(call, C: gl.constexpr):
    consume(2, call, (), C)


_NOT_SPECIALIZED = [
    "num_heads", "group", "num_queries", "num_keys", "query_start", "window_left", "window_right", "stride_rb",
    "stride_rs", "stride_ob", "stride_oh", "stride_os", "value_eights", "all_heads", "tiles_per_head", "section",
    "line_b", "line_h", "line_t", "row_b", "row_h", "row_q", "bias_b", "bias_h", "bias_k", "num_blocks",
    "drop_below",
]  # fmt: skip


@gluon.jit(do_not_specialize=_NOT_SPECIALIZED)
def flashcore_hopper(
    q0_desc,
    q1_desc,
    k0_desc,
    k1_desc,
    v0_desc,
    v1_desc,
    o0_desc,
    o1_desc,
    Lse,
    Range,
    Sinks,
    Out,
    Counter,
    mask_desc,
    Bias,
    Lines,
    Bits,
    Philox,
    num_heads,
    group,
    num_queries,
    num_keys,
    query_start,
    window_left,
    window_right,
    stride_rb,
    stride_rs,
    stride_ob,
    stride_oh,
    stride_os,
    value_eights,
    score_scale,
    cap_scale,
    all_heads,
    tiles_per_head,
    section,
    line_b,
    line_h,
    line_t,
    row_b,
    row_h,
    row_q,
    bias_b,
    bias_h,
    bias_k,
    num_blocks,
    drop_below,
    keep_scale,
    C: gl.constexpr,
):
    """out = softmax(cap(scale * q k^T) + mask) v over the keys that each query sees.

    Shapes: Q `[B, H, Q, D]`, K `[B, Hkv, K, D]`, V `[B, Hkv, K, Dv]` and Out `[B, H, Q, Dv]` come as descriptors of
    the first and of the second tile that a row is cut into. Lse `[B, H, Q]` fp32; Range a KeyRange; Sinks `[H]`;
    Counter an int32 that is 0, and 0 again at the end. With `C.one_copy` there are no descriptors of Out but its
    address, its strides and value_dim, these in units of 8 elements. Of a mask, by `C.mask`: a bias's descriptor, or
    its address where all queries share it; Lines and Bits, its map (or that of a bool mask), and numbers as in
    DenseMask. Philox int64 `[2]` and two numbers, see Dropout.
    Grid: as many programs as run at once, or as there are tiles. The launch's warps are those of the first partition of
    consumers; the other partitions add theirs.
    """
    D0: gl.constexpr = C.d0
    D1: gl.constexpr = C.d1
    DV0: gl.constexpr = C.dv0
    DV1: gl.constexpr = C.dv1
    BN: gl.constexpr = C.block_n
    STAGES: gl.constexpr = C.stages
    RANGE: gl.constexpr = C.range_layout
    HAS_SINKS: gl.constexpr = C.sinks
    HAS_LSE: gl.constexpr = C.lse
    CONSUMERS: gl.constexpr = C.consumers
    ROWS: gl.constexpr = C.rows
    QUERIES: gl.constexpr = 64 * CONSUMERS // ROWS * C.query_buffers  # buffers, of all partitions
    dtype: gl.constexpr = k0_desc.dtype
    # Never looked at, but each field of a record needs a value.
    if D1 == 0:
        q1_desc = q0_desc
        k1_desc = k0_desc
    if DV1 == 0:
        v1_desc = v0_desc
        o1_desc = o0_desc
    if C.one_copy:
        o0_desc = q0_desc
        o1_desc = q0_desc
    if not HAS_LSE:
        Lse = num_heads
    if RANGE == 0:
        Range = num_heads
    if not HAS_SINKS:
        Sinks = num_heads
    if C.mask != BIAS:
        mask_desc = q0_desc
    if C.mask != BIAS_ROW:
        Bias = num_heads
    if C.mask == NO_MASK:
        Lines = num_heads
        Bits = num_heads
    if not C.dropout:
        Philox = num_heads
        drop_below = num_heads
        keep_scale = num_heads
    q0_smem = gl.allocate_shared_memory(dtype, [QUERIES, 1, 1, ROWS, D0], q0_desc.layout)
    k0_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D0], k0_desc.layout)
    v0_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, DV0], v0_desc.layout)
    q1_smem = q0_smem
    k1_smem = k0_smem
    v1_smem = v0_smem
    if D1 > 0:
        q1_smem = gl.allocate_shared_memory(dtype, [QUERIES, 1, 1, ROWS, D1], q1_desc.layout)
        k1_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D1], k1_desc.layout)
    if DV1 > 0:
        v1_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, DV1], v1_desc.layout)
    o_smem = q0_smem
    if C.query_buffers == 1 and not C.one_copy:
        o_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, 64, DV0 // 2], o0_desc.layout)
    mask_smem = q0_smem
    if C.mask == BIAS:
        mask_smem = gl.allocate_shared_memory(mask_desc.dtype, [CONSUMERS, 1, 1, 64, BN], mask_desc.layout)
    keep_smem = gl.allocate_shared_memory(gl.int32, [BN], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    q_full = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_raw = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    positions = gl.allocate_shared_memory(gl.int32, [6, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    position_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    position_asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(QUERIES):
        mbarrier.init(q_full.index(buffer), count=1)
        mbarrier.init(q_empty.index(buffer), count=2 * ROWS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=128 * CONSUMERS)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=128 * CONSUMERS)
    mbarrier.init(v_raw, count=1)
    for entry in gl.static_range(2):
        mbarrier.init(position_full.index(entry), count=1)
    mbarrier.init(position_asked, count=1)
    mask_full = v_raw
    mask_empty = v_raw
    if C.mask == BIAS:
        mask_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
        mask_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
        for consumer in gl.static_range(CONSUMERS):
            mbarrier.init(mask_full.index(consumer), count=1)
            mbarrier.init(mask_empty.index(consumer), count=128)
    fence_async_shared()
    descriptors = Descriptors(
        q0=q0_desc, q1=q1_desc, k0=k0_desc, k1=k1_desc, v0=v0_desc, v1=v1_desc, o0=o0_desc, o1=o1_desc,
        mask=mask_desc,
    )  # fmt: skip
    buffers = Buffers(
        q0=q0_smem, q1=q1_smem, k0=k0_smem, k1=k1_smem, v0=v0_smem, v1=v1_smem, keep=keep_smem, o0=o_smem,
        mask=mask_smem,
    )  # fmt: skip
    barriers = Barriers(
        q_full=q_full, q_empty=q_empty, k_full=k_full, k_empty=k_empty, v_full=v_full, v_empty=v_empty, v_raw=v_raw,
        mask_full=mask_full, mask_empty=mask_empty,
    )  # fmt: skip
    queue = Queue(positions=positions, full=position_full, asked=position_asked, counter=Counter)
    pointers = Pointers(lse=Lse, key_range=Range, sinks=Sinks)
    heads = Heads(num_heads=num_heads, group=group)
    visibility = Visibility(
        num_queries=num_queries, num_keys=num_keys, query_start=query_start, window_left=window_left,
        window_right=window_right, stride_rb=stride_rb, stride_rs=stride_rs,
    )  # fmt: skip
    factors = ScoreFactors(score_scale=score_scale, cap_scale=cap_scale)
    mask = DenseMask(
        lines=Lines, bits=Bits, bias=Bias, line_b=line_b, line_h=line_h, line_t=line_t, row_b=row_b, row_h=row_h,
        row_q=row_q, bias_b=bias_b, bias_h=bias_h, bias_k=bias_k, num_blocks=num_blocks,
    )  # fmt: skip
    order = TileOrder(all_heads=all_heads, tiles_per_head=tiles_per_head, section=section)
    dropout = Dropout(philox=Philox, drop_below=drop_below, keep_scale=keep_scale)
    call = Call(
        descriptors=descriptors, buffers=buffers, barriers=barriers, queue=queue, pointers=pointers, heads=heads,
        visibility=visibility, factors=factors, order=order, mask=mask, dropout=dropout,
    )  # fmt: skip
    # The argument tuples stand in the calls: under a name their constexprs would become tensors.
    if C.one_copy:
        unseen_barriers = Barriers(
            q_full=unseen(q_full), q_empty=unseen(q_empty), k_full=unseen(k_full), k_empty=unseen(k_empty),
            v_full=unseen(v_full), v_empty=unseen(v_empty), v_raw=v_raw, mask_full=v_raw, mask_empty=v_raw,
        )  # fmt: skip
        unseen_queue = Queue(
            positions=unseen(positions), full=unseen(position_full), asked=position_asked, counter=Counter
        )
        unseen_call = Call(
            descriptors=descriptors, buffers=buffers, barriers=unseen_barriers, queue=unseen_queue, pointers=pointers,
            heads=heads, visibility=visibility, factors=factors, order=order, mask=mask, dropout=dropout,
        )  # fmt: skip
        output_rows = OutputRows(
            out=Out, stride_b=stride_ob, stride_h=stride_oh, stride_s=stride_os, value_eights=value_eights
        )
        if SHARED_WORKER_ARGUMENTS:
            gl.warp_specialize(
                (unseen_call, output_rows, C), _both_consumers,
                (call, C), [produce, hand_out], [1, 1],
                [C.producer_registers, C.producer_registers],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (_both_consumers, (unseen_call, output_rows, C)),
                    (produce, (call, C)),
                    (hand_out, (call, C)),
                ],
                [1, 1], [C.producer_registers, C.producer_registers],
            )  # fmt: skip
    elif SHARED_WORKER_ARGUMENTS:
        if CONSUMERS == 2:
            gl.warp_specialize(
                (call, C), _consumer_0,
                (call, C), [_consumer_1, produce, hand_out],
                [4, 1, 1], [C.consumer_registers, C.producer_registers, C.producer_registers],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                (call, C), _consumer_0,
                (call, C), [_consumer_1, _consumer_2, produce, hand_out],
                [4, 4, 1, 1],
                [C.consumer_registers, C.consumer_registers, C.producer_registers, C.producer_registers],
            )  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consumer_0, (call, C)),
                (_consumer_1, (call, C)),
                (produce, (call, C)),
                (hand_out, (call, C)),
            ],
            [4, 1, 1], [C.consumer_registers, C.producer_registers, C.producer_registers],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer_0, (call, C)),
                (_consumer_1, (call, C)),
                (_consumer_2, (call, C)),
                (produce, (call, C)),
                (hand_out, (call, C)),
            ],
            [4, 4, 1, 1],
            [C.consumer_registers, C.consumer_registers, C.producer_registers, C.producer_registers],
        )  # fmt: skip

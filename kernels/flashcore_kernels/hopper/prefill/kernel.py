"""The Hopper forward in Gluon: a scheduler and a producer warp, two or three consumer warpgroups of 64 queries each.

The producer brings Q, K and V to shared memory with the bulk tensor copy engine. Each consumer computes, for its
queries, S = Q K^T of one block while the softmax of the block before and its product P V are under way; P never leaves
the registers. Programs are persistent: the scheduler draws one tile after the other (`schedule`), and the producer is
already at the next one while the consumers finish one.

What a block costs is the time from its scores to the next ones, along which the two consumers must keep the tensor
cores busy for each other. So the loop has no barrier that can be left out: a consumer's threads arrive each for itself
(as `async_copy.mbarrier_arrive`, which Triton does not precede by a barrier of the warpgroup), sums stay with the
threads, and sums of earlier blocks are rescaled only where a maximum grew by much.

Each consumer is a partition with machine code of its own, or two are one partition and share one copy (`one_copy`):
with two copies short tiles wait for instructions a good part of their time. The two then never wait for each other but
where they take turns; that needs the barriers to be `_unseen`, and an output that leaves without the copy engine.

Barriers are pairs: `full` (data has arrived) and `empty` (the consumers are done with it). Both sides count their uses;
use u of a buffer of N stages is stage u % N in phase u // N % 2.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..triton_api import SHARED_WORKER_ARGUMENTS
from .consumer import consume
from .producer import produce
from .schedule import hand_out


@dataclass(frozen=True)
class PrefillConstants:
    """Everything that one compiled kernel is made for.

    Attributes:
        d0, d1, dv0, dv1: pieces that rows of Q and K, and of V, are cut into: powers of two, the second may be 0.
        block_n: keys of a block.
        consumers: warpgroups, of 64 queries each.
        stages: blocks of K and V in shared memory.
        range_layout: 0 no KeyRange, 1 a line a sequence, 2 a line a query.
        softcap, sinks, lse: whether there are any.
        query_slots: tiles of Q in shared memory. With two the output leaves through its queries' slot; with one it
            leaves half after half through a place of its own, and the next queries need not wait for it.
        ahead: a block's exponentials run beside the next block's scores, not beside the product with V before them.
        short_masks: columns are compared as constants, which takes half of the instructions of a block at an edge.
        consumer_registers, producer_registers: of a thread.
        one_copy: both consumers are one partition and run one copy of the machine code.
        turns: such consumers take turns: a block's products of one are issued before the next block's of the other.
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
    query_slots: int
    ahead: bool
    short_masks: bool
    consumer_registers: int
    producer_registers: int
    one_copy: bool
    turns: bool

    @property
    def warps(self) -> int:
        """Warps of a consumers' partition."""
        return 8 if self.one_copy else 4

    @property
    def rows(self) -> int:
        """Queries of a consumers' partition."""
        return 16 * self.warps

    @property
    def output_layouts(self) -> tuple:
        """For each piece of the output `[rows, columns]` two layouts: 8 bytes of a row a thread, and 16.

        The accumulators' gives a thread columns 8 i + 2 lane + j. From each to the next, one bit of the lane changes
        places with one of the register: exchanges within a warp, which Triton does by shuffles.
        """
        warps = [[16 << i, 0] for i in range(self.warps.bit_length() - 1)]
        rows = [[1, 0], [2, 0], [4, 0]]
        pieces = []
        for columns in filter(None, (self.dv0, self.dv1)):
            more = [[0, 1 << i] for i in range(5, columns.bit_length() - 1)]
            registers = ([[0, 1], [0, 2], [8, 0], [0, 16], *more], [[0, 1], [0, 2], [0, 4], [8, 0], *more])
            lanes = ([[0, 8], [0, 4], *rows], [[0, 8], [0, 16], *rows])
            shape = [self.rows, columns]
            pieces.append(tuple(gl.DistributedLinearLayout(*each, warps, [], shape) for each in zip(registers, lanes)))
        return tuple(pieces)


@gluon.jit(noinline=True)
def _unseen(memory):
    """The same memory, as something that Triton knows nothing of.

    It puts a barrier of the partition between any two waits for one array of barriers, for a thread that has slept
    through two phases. None can here, because each thread arrives for itself (at the queries' barrier when it has read
    the next place, see hand_out); and that barrier, in each block, would have two consumers of one partition wait for
    each other. Triton keeps the memory for as long as it sees it used: by the producer. Nothing is called: LLVM sees
    through it.
    """
    return memory


@gluon.jit
def _both_consumers(descs, smem, bars, queue, output, pointers, numbers, scales, C: gl.constexpr):
    consume(0, descs, smem, bars, queue, output, pointers, numbers, scales, C)


@gluon.jit
def _consumer_0(descs, smem, bars, queue, pointers, numbers, scales, C: gl.constexpr):
    consume(0, descs, smem, bars, queue, (), pointers, numbers, scales, C)


@gluon.jit
def _consumer_1(descs, smem, bars, queue, pointers, numbers, scales, C: gl.constexpr):
    consume(1, descs, smem, bars, queue, (), pointers, numbers, scales, C)


@gluon.jit
def _consumer_2(descs, smem, bars, queue, pointers, numbers, scales, C: gl.constexpr):
    consume(2, descs, smem, bars, queue, (), pointers, numbers, scales, C)


_NOT_SPECIALIZED = [
    "num_heads", "group", "num_queries", "num_keys", "query_start", "window_left", "window_right", "stride_rb",
    "stride_rs", "stride_ob", "stride_oh", "stride_os", "value_eights", "all_heads", "tiles_per_head", "section",
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
    C: gl.constexpr,
):
    """out = softmax(cap(scale * q k^T)) v over the keys that each query sees.

    Shapes: descriptors of Q `[B, H, Q, D]`, K `[B, Hkv, K, D]`, V `[B, Hkv, K, Dv]` and Out `[B, H, Q, Dv]`, each for
    the first and the second piece of a row; Lse `[B, H, Q]` fp32; Range a KeyRange; Sinks `[H]`; Counter an int32 that
    is 0, and 0 again at the end. With `C.one_copy` not the descriptors of Out but its address, its strides and
    value_dim, these in units of 8 elements.
    Grid: as many programs as run at once, or as there are tiles; the warps of one partition of consumers, and those of
    the other partitions.
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
    SLOTS: gl.constexpr = 64 * CONSUMERS // ROWS * C.query_slots
    dtype: gl.constexpr = k0_desc.dtype
    # Never looked at, but each place in a tuple needs a value.
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
    q0_smem = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, ROWS, D0], q0_desc.layout)
    k0_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D0], k0_desc.layout)
    v0_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, DV0], v0_desc.layout)
    q1_smem = q0_smem
    k1_smem = k0_smem
    v1_smem = v0_smem
    if D1 > 0:
        q1_smem = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, ROWS, D1], q1_desc.layout)
        k1_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D1], k1_desc.layout)
    if DV1 > 0:
        v1_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, DV1], v1_desc.layout)
    o_smem = q0_smem
    if C.query_slots == 1 and not C.one_copy:
        o_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, 64, DV0 // 2], o0_desc.layout)
    keep_smem = gl.allocate_shared_memory(gl.int32, [BN], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    q_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_raw = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    place_smem = gl.allocate_shared_memory(gl.int32, [6, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    place_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    place_asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=2 * ROWS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=128 * CONSUMERS)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=128 * CONSUMERS)
    mbarrier.init(v_raw, count=1)
    for slot in gl.static_range(2):
        mbarrier.init(place_full.index(slot), count=1)
    mbarrier.init(place_asked, count=1)
    fence_async_shared()
    descs = (q0_desc, q1_desc, k0_desc, k1_desc, v0_desc, v1_desc, o0_desc, o1_desc)
    smem = (q0_smem, q1_smem, k0_smem, k1_smem, v0_smem, v1_smem, keep_smem, o_smem)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw)
    queue = (place_smem, place_full, place_asked, Counter)
    pointers = (Lse, Range, Sinks)
    numbers = (
        num_heads, group, num_queries, num_keys, query_start, window_left, window_right, stride_rb, stride_rs,
    )  # fmt: skip
    scales = (score_scale, cap_scale, all_heads, tiles_per_head, section)
    # The argument tuples stand in the calls: under a name their constexprs would become tensors.
    if C.one_copy:
        unseen = (
            _unseen(q_full), _unseen(q_empty), _unseen(k_full), _unseen(k_empty), _unseen(v_full), _unseen(v_empty),
            v_raw,
        )  # fmt: skip
        unseen_queue = (_unseen(place_smem), _unseen(place_full), place_asked, Counter)
        output = (Out, stride_ob, stride_oh, stride_os, value_eights)
        if SHARED_WORKER_ARGUMENTS:
            gl.warp_specialize(
                (descs, smem, unseen, unseen_queue, output, pointers, numbers, scales, C), _both_consumers,
                (descs, smem, bars, queue, pointers, numbers, scales, C), [produce, hand_out], [1, 1],
                [C.producer_registers, C.producer_registers],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (_both_consumers, (descs, smem, unseen, unseen_queue, output, pointers, numbers, scales, C)),
                    (produce, (descs, smem, bars, queue, pointers, numbers, scales, C)),
                    (hand_out, (descs, smem, bars, queue, pointers, numbers, scales, C)),
                ],
                [1, 1], [C.producer_registers, C.producer_registers],
            )  # fmt: skip
    elif SHARED_WORKER_ARGUMENTS:
        if CONSUMERS == 2:
            gl.warp_specialize(
                (descs, smem, bars, queue, pointers, numbers, scales, C), _consumer_0,
                (descs, smem, bars, queue, pointers, numbers, scales, C), [_consumer_1, produce, hand_out],
                [4, 1, 1], [C.consumer_registers, C.producer_registers, C.producer_registers],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                (descs, smem, bars, queue, pointers, numbers, scales, C), _consumer_0,
                (descs, smem, bars, queue, pointers, numbers, scales, C), [_consumer_1, _consumer_2, produce, hand_out],
                [4, 4, 1, 1],
                [C.consumer_registers, C.consumer_registers, C.producer_registers, C.producer_registers],
            )  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consumer_0, (descs, smem, bars, queue, pointers, numbers, scales, C)),
                (_consumer_1, (descs, smem, bars, queue, pointers, numbers, scales, C)),
                (produce, (descs, smem, bars, queue, pointers, numbers, scales, C)),
                (hand_out, (descs, smem, bars, queue, pointers, numbers, scales, C)),
            ],
            [4, 1, 1], [C.consumer_registers, C.producer_registers, C.producer_registers],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer_0, (descs, smem, bars, queue, pointers, numbers, scales, C)),
                (_consumer_1, (descs, smem, bars, queue, pointers, numbers, scales, C)),
                (_consumer_2, (descs, smem, bars, queue, pointers, numbers, scales, C)),
                (produce, (descs, smem, bars, queue, pointers, numbers, scales, C)),
                (hand_out, (descs, smem, bars, queue, pointers, numbers, scales, C)),
            ],
            [4, 4, 1, 1],
            [C.consumer_registers, C.consumer_registers, C.producer_registers, C.producer_registers],
        )  # fmt: skip

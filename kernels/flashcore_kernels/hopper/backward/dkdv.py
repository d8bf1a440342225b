"""dK and dV: two consumer warpgroups keep 64 keys each, and the queries that see them stream past.

    S^T = K Q^T, P^T = exp(S^T - lse), dP^T = V dO^T, dS^T = P^T * (dP^T - delta)
    dV += P^T dO, dK += dS^T Q, and dK is multiplied by scale in the end

Keys are rows, so P^T and dS^T are first operands from the registers, and K and V lie in shared memory all the time. One
tile is a block of keys of one KV head; it sees the queries of each head of its group in turn, so that no other tile
adds to its sums. Lse and delta are what the products S^T and dP^T start from (see `started_at`). With dropout, dP is 0
where a weight is dropped and delta is not: then it comes later.

As in the forward, programs are persistent: a scheduler warp draws tiles, a producer warp brings Q and dO ahead of the
consumers, and these share nothing but what they read.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..records import Heads, Queue, ScoreFactors, TileOrder
from ..schedule import hand_out
from ..triton_api import SHARED_WORKER_ARGUMENTS
from ..visible import Visibility
from .dkdv_consumer import consume
from .dkdv_pair import consume_of_pair
from .dkdv_producer import produce
from .masks import KEYS
from .records import Call, Descriptors, DkdvBarriers, DkdvBuffers, DkdvPointers, GradientStrides
from .store import store_layouts


@dataclass(frozen=True)
class DkdvConstants:
    """Everything that one compiled kernel is made for.

    Attributes:
        d, dv: columns of the tiles of Q and K, and of dO and V: powers of two.
        block_m: queries of a block.
        query_stages, grad_stages: blocks of Q and of dO in shared memory.
        shared_keys: both consumers have the same keys, see dkdv_pair.py.
        range_layout: 0 no KeyRange, 1 a line a sequence, 2 a line a query.
        softcap, dropout: whether there is any.
        consumer_registers, producer_registers: of a thread.
    """

    d: int
    dv: int
    block_m: int
    query_stages: int
    grad_stages: int
    shared_keys: bool
    range_layout: int
    softcap: bool
    dropout: bool
    consumer_registers: int
    producer_registers: int

    @property
    def tile_keys(self) -> int:
        """Keys of a tile."""
        return 64 if self.shared_keys else 128

    @property
    def key_layouts(self) -> tuple:
        """Of dK, see `store_layouts`."""
        return store_layouts(self.d)

    @property
    def value_layouts(self) -> tuple:
        """Of dV."""
        return store_layouts(self.dv)


@gluon.jit
def _consumer_0(call, C: gl.constexpr):
    if C.shared_keys:
        consume_of_pair(0, call, C)
    else:
        consume(0, call, C)


@gluon.jit
def _consumer_1(call, C: gl.constexpr):
    if C.shared_keys:
        consume_of_pair(1, call, C)
    else:
        consume(1, call, C)


_NOT_SPECIALIZED = [
    "num_kv_heads", "group", "num_queries", "num_keys", "query_start", "window_left", "window_right", "stride_rb",
    "stride_rs", "stride_kb", "stride_kh", "stride_ks", "key_eights", "stride_vb", "stride_vh", "stride_vs",
    "value_eights", "all_heads", "tiles_per_head", "section", "drop_below",
]  # fmt: skip


@gluon.jit(do_not_specialize=_NOT_SPECIALIZED)
def flashcore_hopper_backward_dkdv(
    q_desc,
    g_desc,
    k_desc,
    v_desc,
    Rows,
    Range,
    Spans,
    GradKey,
    GradValue,
    Counter,
    places,
    of_delta,
    num_kv_heads,
    group,
    num_queries,
    num_keys,
    query_start,
    window_left,
    window_right,
    stride_rb,
    stride_rs,
    stride_kb,
    stride_kh,
    stride_ks,
    key_eights,
    stride_vb,
    stride_vh,
    stride_vs,
    value_eights,
    key_scale,
    score_scale,
    cap_scale,
    all_heads,
    tiles_per_head,
    section,
    drop_below,
    value_scale,
    C: gl.constexpr,
):
    """dK = scale dS^T Q and dV = P^T dO, over the queries that see each key.

    Shapes: descriptors of Q `[B, H, Q, D]`, of dO `[B, H, Q, Dv]` in blocks of `C.block_m` rows, of K and V in blocks
    of 64; Rows fp32 `[2 or 4, B * H, places]` as `preprocess` leaves it, `of_delta` between its parts; Range a
    KeyRange; with a line a query Spans int32 `[B, spans, 8]`, see spans.py; GradKey `[B, Hkv, K, D]` and GradValue
    `[B, Hkv, K, Dv]` with strides and columns in units of 8 elements; Counter an int32 that is 0, and 0 again at the
    end. `all_heads` are those of keys.
    Grid: as many programs as run at once, or as there are tiles.
    """
    BM: gl.constexpr = C.block_m
    QS: gl.constexpr = C.query_stages
    GS: gl.constexpr = C.grad_stages
    dtype: gl.constexpr = q_desc.dtype
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    if C.range_layout == 0:
        Range = num_keys
    if C.range_layout != 2:
        Spans = num_keys
    q_smem = gl.allocate_shared_memory(dtype, [QS, 1, 1, BM, C.d], q_desc.layout)
    g_smem = gl.allocate_shared_memory(dtype, [GS, 1, 1, BM, C.dv], g_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [C.tile_keys // KEYS, 1, 1, KEYS, C.d], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [C.tile_keys // KEYS, 1, 1, KEYS, C.dv], v_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [QS, BM], PLAIN)
    delta_smem = gl.allocate_shared_memory(gl.float32, [GS, BM], PLAIN)
    # Without a key range a query nobody looks at those.
    ranges_smem = lse_smem
    if C.range_layout == 2:
        ranges_smem = gl.allocate_shared_memory(gl.int32, [2 * QS, BM], PLAIN)
    words_smem = lse_smem
    if C.dropout:
        words_smem = gl.allocate_shared_memory(gl.float32, [2 * QS, BM], PLAIN)
    keep_smem = gl.allocate_shared_memory(gl.int32, [BM], PLAIN)
    q_full = gl.allocate_shared_memory(gl.int64, [QS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [QS, 1], mbarrier.MBarrierLayout())
    g_full = gl.allocate_shared_memory(gl.int64, [GS, 1], mbarrier.MBarrierLayout())
    g_empty = gl.allocate_shared_memory(gl.int64, [GS, 1], mbarrier.MBarrierLayout())
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    # A warp's threads write and read 8 rows at once: swizzled, so that these lie in different banks.
    p_smem = lse_smem
    p_full = kv_full
    p_empty = kv_full
    if C.shared_keys:
        p_smem = gl.allocate_shared_memory(gl.float32, [KEYS, BM], gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0]))
        p_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        p_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(p_full, count=1)
        mbarrier.init(p_empty, count=128)
    raw = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    positions = gl.allocate_shared_memory(gl.int32, [6, 1], PLAIN)
    position_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    position_asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    # A block is full when the copy engine and the producer's 32 threads have brought their part, see `_copy_rows`.
    for stage in gl.static_range(QS):
        mbarrier.init(q_full.index(stage), count=33)
        mbarrier.init(q_empty.index(stage), count=256)
    for stage in gl.static_range(GS):
        mbarrier.init(g_full.index(stage), count=33)
        mbarrier.init(g_empty.index(stage), count=256)
    for c in gl.static_range(2):
        mbarrier.init(kv_full.index(c), count=1)
        mbarrier.init(kv_empty.index(c), count=128)
        mbarrier.init(position_full.index(c), count=1)
    mbarrier.init(raw, count=1)
    mbarrier.init(position_asked, count=1)
    fence_async_shared()
    pointers = DkdvPointers(
        rows=Rows, key_range=Range, spans=Spans, grad_key=GradKey, grad_value=GradValue, places=places,
        of_delta=of_delta,
        key_strides=GradientStrides(stride_b=stride_kb, stride_h=stride_kh, stride_s=stride_ks, eights=key_eights),
        value_strides=GradientStrides(
            stride_b=stride_vb, stride_h=stride_vh, stride_s=stride_vs, eights=value_eights
        ),
    )  # fmt: skip
    call = Call(
        descriptors=Descriptors(q=q_desc, g=g_desc, k=k_desc, v=v_desc),
        buffers=DkdvBuffers(
            q=q_smem, g=g_smem, k=k_smem, v=v_smem, lse=lse_smem, delta=delta_smem, ranges=ranges_smem,
            words=words_smem, p=p_smem, keep=keep_smem,
        ),
        barriers=DkdvBarriers(
            q_full=q_full, q_empty=q_empty, g_full=g_full, g_empty=g_empty, kv_full=kv_full, kv_empty=kv_empty, raw=raw,
            p_full=p_full, p_empty=p_empty,
        ),
        queue=Queue(positions=positions, full=position_full, asked=position_asked, counter=Counter),
        pointers=pointers,
        grad_scale=key_scale,
        value_scale=value_scale,
        drop_below=drop_below,
        heads=Heads(num_heads=num_kv_heads, group=group),
        visibility=Visibility(
            num_queries=num_queries, num_keys=num_keys, query_start=query_start, window_left=window_left,
            window_right=window_right, stride_rb=stride_rb, stride_rs=stride_rs,
        ),
        factors=ScoreFactors(score_scale=score_scale, cap_scale=cap_scale),
        order=TileOrder(all_heads=all_heads, tiles_per_head=tiles_per_head, section=section),
    )  # fmt: skip
    # The argument tuples stand in the calls: under a name their constexprs would become tensors.
    if SHARED_WORKER_ARGUMENTS:
        gl.warp_specialize(
            (call, C), _consumer_0,
            (call, C), [_consumer_1, produce, hand_out],
            [4, 1, 1], [C.consumer_registers, C.producer_registers, C.producer_registers],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer_0, (call, C)),
                (_consumer_1, (call, C)),
                (produce, (call, C)),
                (hand_out, (call, C)),
            ],
            [4, 1, 1], [C.consumer_registers, C.producer_registers, C.producer_registers],
        )  # fmt: skip

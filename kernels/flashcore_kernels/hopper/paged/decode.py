"""The Hopper decode of single tokens whose keys lie in pages: `flashcore_hopper_decode` behind a look at a block table.

Chunks are cut, and merged, as without pages: a sequence's bits are the same.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..decode.kernel import DecodeConstants, serve_rows
from ..decode.records import Answer, Bitmap, PagedKeysAndValues, Partials, Queries
from ..records import ScoreFactors
from ..visible import FAR, SequenceBounds


@dataclass(frozen=True)
class PagedDecodeConstants(DecodeConstants):
    """Everything that one compiled kernel is made for: DecodeConstants for one query, and

    Attributes:
        page_size: keys of a page, a power of two.
        ring: slots that a sequence uses over and over, 0: one for each key.
        new_keys: the token's own key is not in the pages.
        cumulative: whether key lengths come as sums.
    """

    page_size: int = 256
    ring: int = 0
    new_keys: bool = False
    cumulative: bool = False

    @property
    def paged(self) -> bool:
        return True


_NOT_SPECIALIZED = [
    "num_sequences", "num_tokens", "table_width", "num_pages", "window_left", "window_right", "num_splits",
    "chunks_each", "row_nodes", "stride_table", "stride_qt", "stride_qh", "stride_kp", "stride_ks", "stride_kh",
    "stride_vp", "stride_vs", "stride_vh", "stride_nkt", "stride_nkh", "stride_nvt", "stride_nvh", "padding",
]  # fmt: skip


@gluon.jit(do_not_specialize=_NOT_SPECIALIZED)
def flashcore_hopper_paged_decode(
    Q,
    K,
    V,
    NewK,
    NewV,
    Out,
    Lse,
    Pages,
    CuQ,
    Lengths,
    Sinks,
    KeyScale,
    ValueScale,
    Partial,
    num_sequences,
    num_tokens,
    table_width,
    num_pages,
    window_left,
    window_right,
    num_splits,
    chunks_each,
    row_nodes,
    stride_table,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_ks,
    stride_kh,
    stride_vp,
    stride_vs,
    stride_vh,
    stride_nkt,
    stride_nkh,
    stride_nvt,
    stride_nvh,
    padding,
    score_scale,
    cap_scale,
    C: gl.constexpr,
):
    """out = softmax(cap(scale * q k^T)) v, for the sequences that have one query each; of others nothing is written.

    Shapes: Q `[T, H, D]`; K, V `[pages, page_size, Hkv, D]`; NewK, NewV `[T, Hkv, D]`; Out `[T, H, Dv]`, contiguous;
    Lse `[H, T]` fp32; Pages int32 `[S, table_width]`; CuQ int32 `[S + 1]`; Lengths int32 `[S]`, or sums `[S + 1]`;
    Sinks `[H]`; KeyScale and ValueScale fp32 `[Hkv]`. Strides but that of the table are in units of 16 bytes. With
    `padding` sequences without a query write the padding, the k-th of them its token k. A batch of single tokens asks
    for that and a mixed one does not; it is no constant, so that both have one kernel to compile.
    Partial and the grid: as of `flashcore_hopper_decode`, for S sequences.
    """
    VEC: gl.constexpr = 128 // K.dtype.element_ty.primitive_bitwidth
    tile_of_all = gl.program_id(1 if C.in_a_row else 0)
    split = gl.program_id(0 if C.in_a_row else 1)
    head_of_all = tile_of_all // C.row_tiles
    tile = tile_of_all % C.row_tiles
    s = head_of_all // C.num_kv_heads
    kv_head = head_of_all % C.num_kv_heads
    # Never looked at, but each field of a record needs a value.
    if not C.lse:
        Lse = num_tokens
    if not C.sinks:
        Sinks = num_tokens
    if not C.may_split:
        Partial = num_tokens
    if not C.new_keys:
        NewK = K
        NewV = V

    token = gl.load(CuQ + s)
    queries = gl.load(CuQ + s + 1) - token
    length = gl.load(Lengths + s + (1 if C.cumulative else 0))
    if C.cumulative:
        length -= gl.load(Lengths + s)
    own = queries == 1
    pads = (queries == 0) & (padding != 0)
    token = gl.where(pads, gl.load(CuQ + num_sequences) + s - token, token)
    length = gl.where(pads, 0, length)
    own = own | (pads & (token < num_tokens))
    if own:
        length = gl.maximum(length, 0)
        if C.ring == 0:
            # Programs and mailboxes are there for as many keys as the table has room for, and no more.
            length = gl.minimum(length, table_width * C.page_size)
        first = gl.maximum(length - C.ring, 0) if C.ring > 0 else length * 0
        bounds = SequenceBounds(
            first=first, end=length, start=length - 1,
            left=gl.where(window_left < 0, FAR, gl.minimum(window_left, FAR)),
            right=gl.where(window_right < 0, FAR, gl.minimum(window_right, FAR)), holes=length * 0,
        )  # fmt: skip
        key_scale = num_tokens
        value_scale = num_tokens
        if C.fp8:
            key_scale = KeyScale + kv_head
            value_scale = ValueScale + kv_head
        head_of_pool = kv_head.to(gl.int64)
        at = token.to(gl.int64)
        head = PagedKeysAndValues(
            k=K + head_of_pool * stride_kh * VEC, v=V + head_of_pool * stride_vh * VEC, stride_ks=stride_ks,
            stride_vs=stride_vs, stride_kp=stride_kp, stride_vp=stride_vp,
            table=Pages + s.to(gl.int64) * stride_table, width=table_width, num_pages=num_pages, past=length - 1,
            new_k=NewK + (at * stride_nkt + head_of_pool * stride_nkh) * VEC,
            new_v=NewV + (at * stride_nvt + head_of_pool * stride_nvh) * VEC,
        )  # fmt: skip
        serve_rows(
            head, bounds, Bitmap(words=num_tokens, holes=bounds.holes),
            Queries(
                q=Q, b=token, stride_b=stride_qt, stride_h=stride_qh, stride_s=0, key_scale=key_scale,
                value_scale=value_scale,
            ),
            Answer(
                out=Out, lse=Lse, lse_stride=num_tokens, sinks=Sinks, b=token, kv_head=kv_head,
                num_queries=kv_head * 0 + 1,
            ),
            Partials(words=Partial, num_splits=num_splits, chunks_each=chunks_each, row_nodes=row_nodes), tile,
            head_of_all, split, ScoreFactors(score_scale=score_scale, cap_scale=cap_scale), C,
        )  # fmt: skip

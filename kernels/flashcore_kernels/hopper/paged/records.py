"""What the warps of the kernel for pages hand to each other under names, where the prefill's records do not serve."""

from typing import NamedTuple

from triton.experimental.gluon import language as gl

from ..packed import Packed
from ..prefill.records import Barriers, Buffers
from ..records import Queue, ScoreFactors


class Descriptors(NamedTuple):
    """How the copy engine finds the tensors.

    Attributes:
        q: of Q as `[units, T, pack, D]`, in tiles `[1, 64 / pack, pack, d0]`.
        k, v: of the pool as `[pages, Hkv, page_size, D]`, in tiles `[1, 1, box, d0]`; in columns of 64 where `box` is
            smaller than a block. Pages that do not exist are zeros.
    """

    q: gl.tensor
    k: gl.tensor
    v: gl.tensor


class Table(NamedTuple):
    """The block table. Integers are int32.

    Attributes:
        entries: int32 `[S, width]`.
        stride, width: entries from a line to the next, and that a line has.
        num_pages: of the pool.
        units_each: units of heads for each KV head.
    """

    entries: gl.tensor
    stride: gl.tensor
    width: gl.tensor
    num_pages: gl.tensor
    units_each: gl.tensor


class Pointers(NamedTuple):
    """Global memory. Where the call has no such tensor there is an integer, which is never looked at.

    Attributes:
        out: `[T, H, Dv]`, contiguous.
        value_eights: Dv / 8.
        lse: fp32 `[H, T]`.
        key_range: none.
        sinks: logits `[H]`.
    """

    out: gl.tensor
    value_eights: gl.tensor
    lse: gl.tensor
    key_range: gl.tensor
    sinks: gl.tensor


class PagedCall(NamedTuple):
    """All that the partitions of a program work with, under the names of `prefill.records.Call`."""

    descriptors: Descriptors
    buffers: Buffers
    barriers: Barriers
    queue: Queue
    pointers: Pointers
    visibility: Packed
    factors: ScoreFactors
    table: Table

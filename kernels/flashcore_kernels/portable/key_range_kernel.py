"""A KeyRange from a padding mask in one launch, where PyTorch takes some thirty: once in every decoding step."""

import torch
import triton
import triton.language as tl

from ..runtime.launch import launch

# Keys that a program looks at at once.
BLOCK = 4096


_NUMBERS = ["width", "stride_mb", "stride_mk", "num_keys", "query_start", "left", "right"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["Mask", "QueryStart"])
def flashcore_key_range(
    Words,
    Mask,
    QueryStart,
    stride_qs,
    width,
    stride_mb,
    stride_mk,
    num_keys,
    query_start,
    left,
    right,
    HEADER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One line of the `sequence` layout: what `_write_key_mask` says of sequence program_id(0).

    Shapes: Words int32 `[B, width]`, Mask uint8 `[B, K]`, QueryStart int `[B]` (or of one element, stride 0) or None
    (then `query_start`). Grid: `(B,)`.
    """
    b = tl.program_id(0).to(tl.int64)
    line = Words + b * width
    if QueryStart is not None:
        query_start = tl.load(QueryStart + b * stride_qs).to(tl.int32)
    offs_w = tl.arange(0, BLOCK // 32)  # [W]
    bit = tl.arange(0, 32)
    count = tl.zeros([BLOCK // 32], tl.int32)
    lowest = tl.full([BLOCK // 32], 0x7FFFFFFF, tl.int32)
    highest = tl.zeros([BLOCK // 32], tl.int32)
    for w in range(0, width - HEADER, BLOCK // 32):
        slot = (w + offs_w)[:, None] * 32 + bit[None, :]  # [W, 32]
        at = Mask + b * stride_mb + slot.to(tl.int64) * stride_mk
        kept = tl.load(at, mask=slot < num_keys, other=0) != 0
        tl.store(line + HEADER + w + offs_w, tl.sum(kept.to(tl.int32) << bit[None, :], axis=1),
                 mask=w + offs_w < width - HEADER)  # fmt: skip
        count += tl.sum(kept.to(tl.int32), axis=1)
        lowest = tl.minimum(lowest, tl.min(tl.where(kept, slot, 0x7FFFFFFF), axis=1))
        highest = tl.maximum(highest, tl.max(tl.where(kept, slot + 1, 0), axis=1))
    all_keys = tl.sum(count, axis=0)
    low = tl.minimum(tl.min(lowest, axis=0), num_keys)
    high = tl.max(highest, axis=0)
    tl.store(line, low)
    tl.store(line + 1, high)
    tl.store(line + 2, query_start)
    tl.store(line + 3, left)
    tl.store(line + 4, right)
    tl.store(line + 5, ((all_keys > 0) & (all_keys != high - low)).to(tl.int32))


def run_key_range(
    words: torch.Tensor,
    key_mask: torch.Tensor,
    query_start: int | torch.Tensor,
    left: int,
    right: int,
    header: int,
) -> None:
    """Launch `flashcore_key_range`: write every word of `words`, int32 `[B, width]`.

    Args:
        key_mask: bool `[B, K]`, any strides.
        query_start, left, right: as in `make_key_range`.
        header: words of a line before its bitmap.
    """
    given = isinstance(query_start, torch.Tensor)
    launch(
        flashcore_key_range,
        words.shape[0],
        (
            words, key_mask.view(torch.uint8), query_start if given else None,
            int(given and query_start.numel() > 1),
        ),
        (words.shape[1], *key_mask.stride(), key_mask.shape[1], 0 if given else query_start, left, right),
        (header, BLOCK),
    )  # fmt: skip

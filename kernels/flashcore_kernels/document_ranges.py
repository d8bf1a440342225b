"""A KeyRange for packed documents: which keys each query of one row sees, from offsets on the device."""

from typing import NamedTuple

import torch

from .device import device_of, goes_past_dispatcher
from .key_range import FARTHEST, UNLIMITED, make_row_ranges, rows_shape


class Rows(NamedTuple):
    """Where the queries of one packed row stand, int64 tensors `[Q]`.

    Attributes:
        document: the document that a query belongs to (the last one, for queries behind it).
        slot: key slot at which it stands; the queries of a document are its last tokens.
        first, end: it sees keys [first, end); end <= first where it sees none.
    """

    document: torch.Tensor
    slot: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor


def document_rows(
    num_queries: int,
    cu_queries: torch.Tensor,
    first: torch.Tensor,
    end: torch.Tensor,
    *,
    used_queries: torch.Tensor | None = None,
    left: int = UNLIMITED,
    right: int = UNLIMITED,
    chunk: int = 0,
) -> Rows:
    """What each query of a packed row sees, without a synchronisation.

    Args:
        num_queries: Q, the tokens of the row; those behind the last document see nothing.
        cu_queries: int `[documents + 1]`, offsets of the documents in the queries; empty documents are allowed.
        first, end: int `[documents]`: keys [first, end) are a document's own.
        used_queries: int `[documents]`, the queries of a document that are real; those behind them see nothing.
        left, right: how far a query sees to each side of where it stands, in keys; -1 is without limit.
        chunk: above 0 a query sees keys of its own chunk alone; a document's chunks begin at its first key.
    """
    cu_queries, first, end = cu_queries.to(torch.int64), first.to(torch.int64), end.to(torch.int64)
    token = torch.arange(num_queries, device=cu_queries.device)
    document = torch.searchsorted(cu_queries, token, right=True) - 1  # [Q]
    document = document.clamp(0, cu_queries.shape[0] - 2)
    begin = cu_queries[document]
    count = cu_queries[document + 1] - begin if used_queries is None else used_queries.to(torch.int64)[document]
    first, end = first[document], end[document]
    slot = end - count + (token - begin)
    low, high = seen_from(slot, first, end, left, right, chunk)
    real = (token >= begin) & (token - begin < count)
    return Rows(document, slot, low, torch.where(real, high, low))


def seen_from(
    slot: torch.Tensor, first: torch.Tensor, end: torch.Tensor, left: int, right: int, chunk: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """[first, end) of the keys that a query at `slot` sees of those in [first, end). Tensors broadcast."""
    low, high = torch.broadcast_tensors(first, end)[:2]
    low, high, slot = torch.broadcast_tensors(low, high, slot)
    if chunk:
        start = first + torch.div(slot - first, chunk, rounding_mode="floor") * chunk
        low, high = torch.maximum(low, start), torch.minimum(high, start + chunk)
    if left >= 0:
        low = torch.maximum(low, slot - left)
    if right >= 0:
        high = torch.minimum(high, slot + right + 1)
    return low, high


def make_document_ranges(
    num_queries: int,
    num_keys: int,
    cu_queries: torch.Tensor,
    first: torch.Tensor,
    end: torch.Tensor,
    *,
    used_queries: torch.Tensor | None = None,
    left: int = UNLIMITED,
    right: int = UNLIMITED,
    chunk: int = 0,
) -> torch.Tensor:
    """A KeyRange of the `rows` layout for one packed row of Q queries and K keys, as `document_rows` says.

    In one launch where a kernel of ours can make it, and in some thirty otherwise.
    """
    tensors = [cu_queries, first, end, *([] if used_queries is None else [used_queries])]
    if _in_one_launch(tensors):
        from .portable.document_ranges_kernel import run_document_ranges  # needs Triton

        rows = torch.empty(rows_shape(1, num_queries, num_keys), dtype=torch.int32, device=cu_queries.device)
        cu_queries, first, end, *used = (tensor.contiguous() for tensor in tensors)
        used_queries = used[0] if used else None
        left, right = min(left, FARTHEST), min(right, FARTHEST)
        run_document_ranges(rows, num_queries, cu_queries, first, end, used_queries, left, right, min(chunk, FARTHEST))
        return rows
    rows = document_rows(
        num_queries, cu_queries, first, end, used_queries=used_queries, left=left, right=right, chunk=chunk
    )
    return make_row_ranges(rows.first[None], rows.end[None], num_keys)


def _in_one_launch(tensors: list[torch.Tensor]) -> bool:
    if not tensors[0].is_cuda or torch.compiler.is_compiling():
        return False
    if any(t.dtype not in (torch.int32, torch.int64) or t.device != tensors[0].device for t in tensors):
        return False
    return goes_past_dispatcher(tensors[0]) and device_of(tensors[0].device).kind == "cuda"

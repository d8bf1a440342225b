"""A KeyRange for packed documents in one launch, where PyTorch takes some thirty: once a layer in a varlen call."""

import torch
import triton
import triton.language as tl

from ..runtime.launch import launch

# Lines that a program writes.
BLOCK = 256


_NUMBERS = ["num_queries", "num_lines", "width", "documents", "steps", "left", "right", "chunk"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["CuQueries", "First", "End", "Used"])
def flashcore_document_ranges(
    Rows,
    CuQueries,
    First,
    End,
    Used,
    num_queries,
    num_lines,
    width,
    documents,
    steps,
    left,
    right,
    chunk,
    BLOCK: tl.constexpr,
):
    """Lines of the `rows` layout: what `document_rows` says of BLOCK tokens.

    Shapes: Rows int32 `[Q + K, width]`, CuQueries int `[documents + 1]`, First, End and Used int `[documents]` (Used or
    None). Grid: `(ceil((Q + K) / BLOCK),)`.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [T]
    # The last document that begins at or before the token, by halving: it is one of low..high.
    low = token * 0
    high = token * 0 + documents - 1
    for _ in range(0, steps):
        middle = (low + high + 1) // 2
        begins = tl.load(CuQueries + middle).to(tl.int32) <= token
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, tl.maximum(middle - 1, 0))
    begin = tl.load(CuQueries + low).to(tl.int32)
    if Used is not None:
        count = tl.load(Used + low).to(tl.int32)
    else:
        count = tl.load(CuQueries + low + 1).to(tl.int32) - begin
    first = tl.load(First + low).to(tl.int32)
    end = tl.load(End + low).to(tl.int32)
    slot = end - count + token - begin  # where the query stands
    seen = first
    if chunk > 0:
        within = (slot - first) % chunk
        start = slot - tl.where(within < 0, within + chunk, within)
        seen = tl.maximum(first, start)
        end = tl.minimum(end, start + chunk)
    if left >= 0:
        seen = tl.maximum(seen, slot - left)
    if right >= 0:
        end = tl.minimum(end, slot + right + 1)
    real = (token < num_queries) & (token >= begin) & (token - begin < count)
    line = Rows + token.to(tl.int64) * width
    tl.store(line, tl.where(real, seen, 0), mask=token < num_lines)
    tl.store(line + 1, tl.where(real, end, 0), mask=token < num_lines)


def run_document_ranges(
    rows: torch.Tensor,
    num_queries: int,
    cu_queries: torch.Tensor,
    first: torch.Tensor,
    end: torch.Tensor,
    used_queries: torch.Tensor | None,
    left: int,
    right: int,
    chunk: int,
) -> None:
    """Launch `flashcore_document_ranges`: write the two words of every line of `rows`, int32 `[1, 1, Q + K, width]`.

    Args: as `document_rows`, int32 or int64, contiguous.
    """
    num_lines, width = rows.shape[2:]
    documents = cu_queries.shape[0] - 1
    launch(
        flashcore_document_ranges,
        -(-num_lines // BLOCK),
        (rows, cu_queries, first, end, used_queries),
        (num_queries, num_lines, width, documents, documents.bit_length(), left, right, chunk),
        (BLOCK,),
    )

"""Who bench_prefill.py times: this library's kernels, in pages and packed too, FlashAttention-3, PyTorch's own."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from prefill_cases import Case, Inputs
from torch.nn.attention import SDPBackend, sdpa_kernel

PEERS = ("paged", "varlen", "fa3", "fa3_paged", "cudnn", "flash", "flex", "portable")
OURS = ("flashcore", "paged", "varlen", "portable")
PAGE = 256  # keys


# Each contender: a function from a case and inputs to a call that answers `[B, H, Q, Dv]`, or None where it cannot.


def arguments_of(case: Case, device: torch.device) -> dict:
    """Keywords of our `attention` for a case."""
    from flashcore_kernels import make_document_ranges, make_key_range

    if case.kind == "packed":
        bounds = case.bounds(device)
        return {"key_range": make_document_ranges(case.queries, case.keys, bounds, bounds[:-1], bounds[1:], right=0)}
    if case.lengths:
        first = torch.tensor([case.keys - length for length in case.lengths], device=device)
        return {"key_range": make_key_range(case.batch, case.keys, first=first, right=0)}
    return {"is_causal": case.causal, "window": case.window}


def flashcore(case: Case, x: Inputs, portable: bool = False) -> Callable | None:
    from flashcore_kernels import attention, op, path_counts
    from flashcore_kernels.runtime import prepared

    arguments = arguments_of(case, x.query.device)
    device = op.device_of(x.query.device)

    def call():
        return attention(*x, **arguments)

    def call_portable():
        # With a Triton that is too old for the Hopper kernel, which no call like this one was served by before.
        op.device_of, prepared._calls = (lambda _: device._replace(triton=(0, 0))), prepared_portable
        try:
            return attention(*x, **arguments)
        finally:
            op.device_of, prepared._calls = original, prepared_others

    if not portable:
        return call
    original, prepared_others, prepared_portable = op.device_of, prepared._calls, {}
    path_counts.clear()
    for _ in range(2):
        call_portable()
    if set(path_counts) != {"flashcore_forward"}:
        raise RuntimeError(f"the portable kernel was to be timed, and {dict(path_counts)} served the call")
    return call_portable


def rows_of(x: Inputs) -> list[torch.Tensor]:
    """`[T, H, D]` of all tokens, views."""
    return [t.transpose(1, 2).flatten(0, 1) for t in x]


def batched(case: Case, rows: torch.Tensor) -> torch.Tensor:
    """`[B, H, Q, Dv]` of an answer `[T, H, Dv]`."""
    return rows.unflatten(0, (case.batch, case.queries)).transpose(1, 2)


def window_of(case: Case) -> tuple[int, int]:
    return (case.window - 1, 0) if case.window else (-1, -1)


def varlen(case: Case, x: Inputs) -> Callable | None:
    """FlashAttention's function for sequences behind each other, ours."""
    from flashcore_kernels.flash_attn import flash_attn_varlen_func

    if case.kind == "padded":
        return None
    query, key, value = rows_of(x)
    queries = keys = case.bounds(query.device)
    if case.queries != case.keys:
        keys = torch.arange(case.batch + 1, dtype=torch.int32, device=query.device) * case.keys
    options = {"causal": case.causal, "window_size": window_of(case)}

    def call():
        return batched(case, flash_attn_varlen_func(query, key, value, queries, keys, None, None, **options))

    return call


def in_pages(case: Case, x: Inputs) -> tuple[torch.Tensor, ...] | None:
    """(keys, values `[pages, PAGE, Hkv, D]`, block table): the pages of each sequence all over the pool."""
    if case.lengths:
        return None
    size = min(PAGE, 16 if case.keys < PAGE else PAGE)
    width = -(-case.keys // size)
    order = torch.randperm(case.batch * width, generator=torch.Generator().manual_seed(0)).to(x.key.device)
    pools = []
    for part in x[1:]:
        pages = F.pad(part, (0, 0, 0, width * size - case.keys)).transpose(1, 2).reshape(-1, size, *part.shape[1::2])
        pool = torch.empty_like(pages)
        pool[order] = pages
        pools.append(pool)
    return *pools, order.view(case.batch, width).int()


def paged(case: Case, x: Inputs) -> Callable | None:
    from flashcore_kernels import Pages, paged_attention

    pools = in_pages(case, x)
    if pools is None:
        return None
    query = rows_of(x)[0]
    lengths = torch.full((case.batch,), case.keys, dtype=torch.int32, device=query.device)
    pages = Pages(*pools, case.bounds(query.device), lengths)
    options = {"is_causal": case.causal, "window": case.window}
    return lambda: batched(case, paged_attention(query, pages, **options))


def fa3_arguments(case: Case) -> dict:
    left, right = window_of(case)
    arguments = {"softmax_scale": case.head_dim**-0.5, "is_causal": case.causal}
    return arguments | {"window_size_left": left, "window_size_right": right}


def fa3_paged(case: Case, x: Inputs, forward) -> Callable | None:
    pools = in_pages(case, x) if forward is not None else None
    if pools is None:
        return None
    key, value, table = pools
    query = x.query.transpose(1, 2)
    lengths = torch.full((case.batch,), case.keys, dtype=torch.int32, device=query.device)
    splits = {"num_splits": 0 if case.kind == "chunked" else 1}

    def call():
        answer = forward(query, key, value, page_table=table, seqused_k=lengths, **fa3_arguments(case), **splits)
        return answer[0].transpose(1, 2)

    return call


def existing(case: Case, device: torch.device) -> torch.Tensor | None:
    """int64: the tokens that exist, of left-padded sequences; None where all do."""
    if case.kind != "padded":
        return None
    lengths = torch.tensor(case.lengths, device=device)
    return (torch.arange(case.keys, device=device) >= case.keys - lengths[:, None]).flatten().nonzero().flatten()


def fa3(case: Case, x: Inputs, forward) -> Callable | None:
    if forward is None:
        return None
    arguments = fa3_arguments(case) | {"num_splits": 1}
    if case.kind == "chunked":
        # Few tiles: its own choice of splits and of packed heads is its best.
        arguments |= {"num_splits": 0, "pack_gqa": None}
    if not case.lengths:
        query, key, value = (t.transpose(1, 2) for t in x)
        return lambda: forward(query, key, value, **arguments)[0].transpose(1, 2)

    # Left padding as Transformers does it: the tokens that exist packed, and the answer scattered back.
    rows, tokens, bounds = rows_of(x), existing(case, x.query.device), case.bounds(x.query.device)
    longest = max(case.lengths)
    lengths = {
        "cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest,
    }  # fmt: skip

    def call():
        packed = rows if tokens is None else [t.index_select(0, tokens) for t in rows]
        answer = forward(*packed, **lengths, **arguments)[0]
        if tokens is not None:
            answer = answer.new_zeros(rows[0].shape[0], *answer.shape[1:]).index_copy_(0, tokens, answer)
        return batched(case, answer)

    return call


def fused(case: Case, x: Inputs, backend: SDPBackend) -> Callable | None:
    """PyTorch's SDPA with one of its fused kernels."""
    mask = None
    if case.window or (case.causal and case.queries != case.keys) or case.lengths:
        if backend is SDPBackend.FLASH_ATTENTION or case.keys > 8192:
            return None
        rows = torch.arange(case.queries, device=x.query.device)
        mask = torch.stack([case.visible(b, rows) for b in range(case.batch if case.lengths else 1)])[:, None]

    def call():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                *x, attn_mask=mask, is_causal=case.causal and mask is None, enable_gqa=case.heads != case.kv_heads
            )

    return call


def flex(case: Case, x: Inputs) -> Callable | None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = x.query.device
    padding = [case.keys - length for length in case.lengths] if case.kind == "padded" else [0] * case.batch
    first = torch.tensor(padding, device=device)
    document = case.documents(device) if case.kind == "packed" else torch.zeros(case.keys, device=device)
    offset, window = case.keys - case.queries, case.window or 1 << 30

    def seen(b, h, q, k):
        return (k <= q + offset) & (k > q + offset - window) & (k >= first[b]) & (document[q + offset] == document[k])

    mask = None
    if case.causal:
        batch = case.batch if case.kind == "padded" else None
        mask = create_block_mask(seen, batch, None, case.queries, case.keys, device=str(device))
    global _flex
    _flex = _flex or torch.compile(flex_attention, dynamic=False)
    return lambda: _flex(*x, block_mask=mask, enable_gqa=case.heads != case.kv_heads)


_flex = None


def contender(name: str, case: Case, x: Inputs, forward) -> Callable | None:
    """A call of one of PEERS or "flashcore", None where it cannot do the case.

    Args:
        forward: FlashAttention-3's, or None.
    """
    if name in ("flashcore", "portable"):
        return flashcore(case, x, name == "portable")
    if name in ("fa3", "fa3_paged"):
        return {"fa3": fa3, "fa3_paged": fa3_paged}[name](case, x, forward)
    if name in ("paged", "varlen", "flex"):
        return {"paged": paged, "varlen": varlen, "flex": flex}[name](case, x)
    return fused(case, x, {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[name])

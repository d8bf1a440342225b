"""One call of FlashAttention's in terms of ours: on a batch, and on one packed row of documents."""

import torch

from ..document_ranges import document_rows, make_document_ranges, seen_from
from ..key_range import make_key_range, make_row_ranges
from ..op import attend
from ..problem import Inputs, any_requires_grad
from .options import Options

# An ALiBi bias is written down; larger ones are refused, before they take a GPU's memory.
LARGEST_BIAS = 1 << 29

Lengths = int | torch.Tensor | None


def attend_batch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    *,
    first: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a batch; the queries are the last tokens of [first, end).

    Args:
        q: `[B, Q, H, D]`.
        k, v: `[B, K, Hkv, D]` and `[B, K, Hkv, Dv]`.
        first, end: int `[B]`: keys [first, end) of a sequence exist; None for 0 and K.

    Returns:
        out `[B, Q, H, Dv]`; lse `[B, H, Q]` with return_lse.
    """
    _check_dims(q, k, v, 4)
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return _nothing_seen(q, k, v, options.sinks)
    batch_size, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]
    key_range = None
    if options.chunk:
        low, high, slot = _bounds(first, end, batch_size, num_queries, num_keys, q.device)
        key_range = make_row_ranges(*seen_from(slot, low, high, options.left, options.right, options.chunk), num_keys)
    elif first is not None or end is not None:
        key_range = make_key_range(
            batch_size, num_keys, first=0 if first is None else first, end=end,
            query_start=(num_keys if end is None else end) - num_queries, left=options.left, right=options.right,
            device=q.device,
        )  # fmt: skip
    bias = None
    if options.slopes is not None:
        slopes = _slopes_of(options.slopes, batch_size, q.shape[2])[:, None]
        slot = _bounds(first, end, batch_size, num_queries, num_keys, q.device)[2]
        # One for all sequences where they do not differ.
        bias = _alibi(slopes[:1] if options.slopes.dim() == 1 else slopes, slot[:1] if end is None else slot, num_keys)
    q, k, v, descales = _one_dtype(q, k, v, options)
    out, lse = _run(q, k, v, options, key_range, bias, descales, return_lse)
    return out, (lse if return_lse else None)


def attend_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    *,
    cu_queries: torch.Tensor,
    first: torch.Tensor,
    end: torch.Tensor,
    used_queries: torch.Tensor | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of documents that lie behind each other: nothing is padded, no length is read on the host.

    Args:
        q: `[T, H, D]`.
        k, v: `[Tk, Hkv, D]` and `[Tk, Hkv, Dv]`.
        cu_queries, first, end, used_queries: as in `document_rows`.

    Returns:
        out `[T, H, Dv]`; lse `[H, T]` with return_lse.
    """
    _check_dims(q, k, v, 3)
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        out, lse = _nothing_seen(q[None], k[None], v[None], options.sinks)
        return out[0], lse[0]
    num_keys, documents = k.shape[0], cu_queries.shape[0] - 1
    pattern = {
        "used_queries": used_queries, "left": options.left, "right": options.right, "chunk": options.chunk
    }  # fmt: skip
    key_range = make_document_ranges(q.shape[0], num_keys, cu_queries, first, end, **pattern)
    bias = None
    if options.slopes is not None or options.descales != (None, None, None):
        rows = document_rows(q.shape[0], cu_queries, first, end, **pattern)
        q, k, v = _packed_descaled(q, k, v, options, rows.document, first)
        if options.slopes is not None:
            slopes = _slopes_of(options.slopes, documents, q.shape[1])[rows.document]  # [T, H]
            bias = _alibi(slopes[None], rows.slot[None], num_keys)
    q, k, v, descales = _one_dtype(q[None], k[None], v[None], options._replace(descales=(None, None, None)))
    qv = None if options.qv is None else options.qv[None]
    out, lse = _run(q, k, v, options._replace(qv=qv), key_range, bias, descales, return_lse)
    return out[0], (lse[0] if return_lse else None)


def _run(q, k, v, options, key_range, bias, descales, return_lse):
    """(out `[B, Q, H, Dv]`, lse `[B, H, Q]`) of q, k, v `[B, S, heads, D]`."""
    if options.qv is not None:
        _check_qv(q, v, options.qv)
        # q k + qv v is one product of the two behind each other.
        q, k = torch.cat([q, options.qv], dim=-1), torch.cat([k, v], dim=-1)
    window = None if key_range is not None else (options.left, options.right)
    inputs = Inputs(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), key_range, bias, options.sinks, *descales)
    return attend(inputs, False, window, options.scale, options.softcap, return_lse, options.dropout)


def _bounds(first, end, batch_size: int, num_queries: int, num_keys: int, device) -> tuple[torch.Tensor, ...]:
    """(first `[B, 1]`, end `[B, 1]`, slot `[B, Q]`), int64."""
    low = torch.zeros(batch_size, dtype=torch.int64, device=device) if first is None else first.to(torch.int64)
    high = torch.full_like(low, num_keys) if end is None else end.to(torch.int64)
    slot = high[:, None] - num_queries + torch.arange(num_queries, device=device)
    return low[:, None], high[:, None], slot


def _slopes_of(slopes: torch.Tensor, batch_size: int, num_heads: int) -> torch.Tensor:
    """`[B, H]`."""
    if tuple(slopes.shape) not in ((num_heads,), (batch_size, num_heads)):
        raise ValueError(
            f"alibi_slopes: got {list(slopes.shape)}; [heads] = [{num_heads}] or [batch, heads] = "
            f"[{batch_size}, {num_heads}] is needed"
        )
    return slopes.detach().to(torch.float32).expand(batch_size, num_heads)


def _alibi(slopes: torch.Tensor, slot: torch.Tensor, num_keys: int) -> torch.Tensor:
    """-slope * |slot - key|, float32 `[B or 1, H, Q, K]`, of slopes `[B or 1, Q or 1, H]` and slot `[B or 1, Q]`."""
    size = max(slopes.shape[0], slot.shape[0]) * slopes.shape[2] * slot.shape[1] * num_keys
    if size > LARGEST_BIAS:
        raise NotImplementedError(
            f"alibi_slopes: the bias of {size} elements (heads x queries x keys) would be written to memory, which is "
            f"done up to {LARGEST_BIAS}. Use FlashAttention-2 for ALiBi at this length"
        )
    distance = (slot[:, :, None] - torch.arange(num_keys, device=slot.device)).abs()  # [B, Q, K]
    return -slopes.transpose(1, 2)[..., None] * distance[:, None].to(torch.float32)


def _one_dtype(q, k, v, options: Options):
    """(q, k, v, (key_scale, value_scale)): q in e4m3 becomes bfloat16, k and v in e4m3 stay, and get scales."""
    q_descale, k_descale, v_descale = options.descales
    if options.qv is not None and torch.float8_e4m3fn in (q.dtype, k.dtype):
        raise ValueError("qv: q, k and v in float8_e4m3fn do not go with it; float16 or bfloat16 is needed")
    if q.dtype == torch.float8_e4m3fn:
        q = q.float()
        if q_descale is not None:
            q = q * q_descale.repeat_interleave(q.shape[2] // k.shape[2], dim=1)[:, None, :, None]
        q = q.to(torch.bfloat16)
    if k.dtype != torch.float8_e4m3fn:
        return q, k, v, (None, None)
    shape = k.shape[0], k.shape[2]
    return q, k, v, (_scale(k_descale, shape, k.device), _scale(v_descale, shape, k.device))


def _scale(descale: torch.Tensor | None, shape: tuple[int, int], device) -> torch.Tensor:
    if descale is None:
        return torch.ones(shape, dtype=torch.float32, device=device)
    return descale.to(torch.float32).expand(shape).contiguous()


def _packed_descaled(q, k, v, options: Options, document, first):
    """q, k and v of a packed row; those in e4m3 whose documents have scales of their own become bfloat16."""
    q_descale, k_descale, v_descale = options.descales
    if q.dtype == torch.float8_e4m3fn and q_descale is not None:
        scale = q_descale.repeat_interleave(q.shape[1] // k.shape[1], dim=1)[document]
        q = (q.float() * scale[..., None]).to(torch.bfloat16)
    if k.dtype == torch.float8_e4m3fn and (k_descale is not None or v_descale is not None):
        token = torch.arange(k.shape[0], device=k.device)
        # Documents lie in order, and a token belongs to the last that begins at or before it.
        owner = (torch.searchsorted(first.to(torch.int64), token, right=True) - 1).clamp(min=0)
        k, v = (
            (t.float() if descale is None else t.float() * descale[owner][..., None]).to(torch.bfloat16)
            for t, descale in ((k, k_descale), (v, v_descale))
        )
    return q, k, v


def _check_dims(q, k, v, dims: int) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != dims:
            wanted = "[batch, seqlen, heads, head_dim]" if dims == 4 else "[total, heads, head_dim]"
            raise ValueError(f"{name}: got {list(tensor.shape)}; {wanted} is needed")


def _check_qv(q, v, qv) -> None:
    if qv.shape != (*q.shape[:3], v.shape[3]) or qv.dtype != q.dtype:
        raise ValueError(
            f"qv: got {qv.dtype} {list(qv.shape)}; q's dtype, and its shape with v's head_dim, "
            f"{[*q.shape[:3], v.shape[3]]}, are needed"
        )


def _nothing_seen(q, k, v, sinks) -> tuple[torch.Tensor, torch.Tensor]:
    """What queries without a key get: zeros, and an lse of -inf, or of the sinks. Gradients are zeros."""
    dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
    batch_size, num_queries, num_heads = q.shape[:3]
    out = torch.zeros(batch_size, num_queries, num_heads, v.shape[3], dtype=dtype, device=q.device)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    lse = torch.full((batch_size, num_heads, num_queries), -torch.inf, dtype=lse_dtype, device=q.device)
    if sinks is not None:
        lse = sinks.to(lse_dtype)[:, None].expand_as(lse).contiguous()
    if torch.is_grad_enabled() and any_requires_grad(q, k, v):
        for tensor in (q, k, v):  # zeros of theirs, so that a backward finds its way to them
            out = out + tensor.masked_fill(torch.ones_like(tensor, dtype=torch.bool), 0.0).sum()
    return out, lse

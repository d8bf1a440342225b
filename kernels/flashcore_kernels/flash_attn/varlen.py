"""FlashAttention's functions for sequences of different lengths behind each other."""

import torch

from ..cache.paged import paged_attention
from .dense import answer, unpacked
from .engine import attend_packed
from .options import Window, options_of
from .paged import pages_of
from .pages import gather_pages


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | torch.Tensor | None,
    max_seqlen_k: int | torch.Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    attention_chunk: int = 0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    s_aux: torch.Tensor | None = None,
):
    """Attention of B sequences that lie behind each other: nothing is padded, and no length is read on the host.

    Args:
        q: `[T, H, D]`, T tokens of all sequences.
        k, v: `[Tk, Hkv, D]` and `[Tk, Hkv, Dv]`; with block_table `[pages, page_size, Hkv, D]` and Dv.
        cu_seqlens_q, cu_seqlens_k: int32 `[B + 1]` on q's device: sequence b has tokens [cu[b], cu[b + 1]). Sequences
            may be empty. Tokens behind the last one give zeros. cu_seqlens_k may be None with block_table and
            seqused_k.
        max_seqlen_q, max_seqlen_k: an int, a tensor or None; not read.
        block_table: int32 `[B, blocks]`: which page holds which tokens of a sequence; -1 for none.
        seqused_q, seqused_k: int32 `[B]`, the tokens of each sequence that are real; those behind them are not read,
            and give zeros.
        Others as in `flash_attn_func`; slopes and descales `[B, ...]` are of each sequence. A descale of k or v
            multiplies a copy.

    Returns:
        out `[T, H, Dv]`; with return_attn_probs (out, softmax_lse, S_dmask), softmax_lse float32 `[H, T]`.

    Raises: as `flash_attn_func`.
    """
    options = options_of(
        softmax_scale, causal, window_size, softcap, dropout_p=dropout_p, alibi_slopes=alibi_slopes,
        attention_chunk=attention_chunk, qv=qv, descales=(q_descale, k_descale, v_descale), s_aux=s_aux,
        sm_margin=sm_margin,
    )  # fmt: skip
    batch_size = _check_lengths(q, cu_seqlens_q, cu_seqlens_k, block_table, seqused_q, seqused_k)
    if block_table is not None:
        lengths = cu_seqlens_k.diff() if seqused_k is None else seqused_k
        pages = None if seqused_q is not None else pages_of(q, k, v, block_table, cu_seqlens_q, lengths, options)
        if pages is not None:
            said = paged_attention(
                q, pages, is_causal=False, window=(options.left, options.right), scale=options.scale,
                softcap=options.softcap, sinks=options.sinks, return_lse=return_attn_probs,
            )  # fmt: skip
            return answer(*(said if return_attn_probs else (said, None)), options, return_attn_probs)
        room = block_table.shape[1] * k.shape[1]  # tokens that a sequence's pages hold
        k, v = (gather_pages(pool, block_table).flatten(0, 1) for pool in (k, v))
        first = torch.arange(batch_size, device=q.device) * room
        end = first + lengths.clamp(0, room)  # what lies behind is another sequence's
    else:
        first = cu_seqlens_k[:-1]
        end = cu_seqlens_k[1:] if seqused_k is None else first + seqused_k
    out, lse = attend_packed(
        q, k, v, options, cu_queries=cu_seqlens_q, first=first, end=end, used_queries=seqused_q,
        return_lse=return_attn_probs,
    )  # fmt: skip
    return answer(out, lse, options, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | torch.Tensor | None,
    max_seqlen_k: int | torch.Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """`flash_attn_varlen_func` of kv `[Tk, 2, Hkv, D]`."""
    k, v = unpacked(kv, 2, 4, "kv")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | torch.Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """`flash_attn_varlen_func` of qkv `[T, 3, H, D]`."""
    q, k, v = unpacked(qkv, 3, 4, "qkv")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _check_lengths(q, cu_seqlens_q, cu_seqlens_k, block_table, seqused_q, seqused_k) -> int:
    """B, where all tensors of lengths fit each other."""
    if cu_seqlens_k is None and (block_table is None or seqused_k is None):
        raise ValueError("cu_seqlens_k: got None; it may be left out with block_table and seqused_k alone")
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] < 2:
        raise ValueError(f"cu_seqlens_q: got {list(cu_seqlens_q.shape)}; [sequences + 1], at least [2], is needed")
    batch_size = cu_seqlens_q.shape[0] - 1
    lengths = {"seqused_q": (seqused_q, batch_size), "seqused_k": (seqused_k, batch_size)}
    lengths |= {"cu_seqlens_q": (cu_seqlens_q, batch_size + 1), "cu_seqlens_k": (cu_seqlens_k, batch_size + 1)}
    for name, (tensor, size) in lengths.items():
        if tensor is not None:
            check_ints(name, tensor, (size,), q.device)
    if block_table is not None and (block_table.dim() != 2 or block_table.shape[0] != batch_size):
        raise ValueError(f"block_table: got {list(block_table.shape)}; [sequences, blocks] is needed, of {batch_size}")
    return batch_size


def check_ints(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise a ValueError unless `tensor` has this shape, an int dtype, and is on this device."""
    if tuple(tensor.shape) != shape or tensor.dtype not in (torch.int32, torch.int64) or tensor.device != device:
        raise ValueError(
            f"{name}: got {tensor.dtype} {list(tensor.shape)} on {tensor.device}; int32 {list(shape)} on {device} is "
            "needed"
        )

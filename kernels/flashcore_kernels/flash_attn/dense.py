"""FlashAttention's functions for batches of one length."""

import torch

from .engine import attend_batch
from .options import Options, Window, options_of


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
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
    """Attention of a batch. The queries are the last of the keys' tokens: query i stands at key Sk - Sq + i.

    Args:
        q: `[B, Sq, H, D]`.
        k, v: `[B, Sk, Hkv, D]` and `[B, Sk, Hkv, Dv]`; query head h reads KV head h // (H / Hkv).
        dropout_p: probability of dropping an attention weight, after the softmax.
        softmax_scale: factor on the scores; D ** -0.5 where None, with qv (D + Dv) ** -0.5.
        causal: a query sees no key behind where it stands.
        window_size: (left, right), keys to each side of where a query stands that it sees; -1 for no limit.
        softcap: c > 0 replaces scores s by c * tanh(s / c).
        alibi_slopes: float32 `[H]` or `[B, H]`: -slope times the distance is added to a score, as a mask that is
            written to memory, of at most 2 ** 29 elements.
        deterministic: of no effect; flashcore's answers and gradients are always the same.
        return_attn_probs: return the log-sum-exp too.
        qv: `[B, Sq, H, Dv]`: qv times v is added to q times k. Keys and values are copied behind each other for it.
        q_descale, k_descale, v_descale: float32 `[B, Hkv]`, what q, k and v in float8_e4m3fn are multiplied with; not
            read in other dtypes, as FlashAttention-3 has it.
        attention_chunk: above 0, a query sees keys of its own chunk of so many alone.
        num_splits, pack_gqa: of no effect: how FlashAttention-3 divides its work.
        sm_margin: 0.
        s_aux: `[H]`, a logit in each head's denominator (attention sinks).

    Returns:
        out `[B, Sq, H, Dv]`, in q's dtype (bfloat16 for float8_e4m3fn); a query that sees no key gives zeros. With
        return_attn_probs (out, softmax_lse, S_dmask): softmax_lse float32 `[B, H, Sq]`, -inf where no key is seen;
        S_dmask of no elements, as FlashAttention-2 returns it without dropout.

    Raises:
        ValueError: an argument does not fit.
        NotImplementedError: sm_margin; dropout with return_attn_probs; an ALiBi mask that is too large.
    """
    options = options_of(
        softmax_scale, causal, window_size, softcap, dropout_p=dropout_p, alibi_slopes=alibi_slopes,
        attention_chunk=attention_chunk, qv=qv, descales=(q_descale, k_descale, v_descale), s_aux=s_aux,
        sm_margin=sm_margin,
    )  # fmt: skip
    out, lse = attend_batch(q, k, v, options, return_lse=return_attn_probs)
    return answer(out, lse, options, return_attn_probs)


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """`flash_attn_func` of kv `[B, Sk, 2, Hkv, D]`."""
    k, v = unpacked(kv, 2, 5, "kv")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    attention_chunk: int = 0,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
):
    """`flash_attn_func` of qkv `[B, S, 3, H, D]`, or `[B, S, H + 2 * Hkv, D]` with H given as `num_heads_q`."""
    q, k, v = split_heads(qkv, num_heads_q) if num_heads_q is not None else unpacked(qkv, 3, 5, "qkv")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk,
        sm_margin=sm_margin,
    )  # fmt: skip


def unpacked(packed: torch.Tensor, count: int, dims: int, name: str) -> tuple[torch.Tensor, ...]:
    """The tensors that lie behind each other in the dimension before the heads."""
    if packed.dim() != dims or packed.shape[-3] != count:
        wanted = ["total"] if dims == 4 else ["batch", "seqlen"]
        raise ValueError(f"{name}: got {list(packed.shape)}; [{', '.join(wanted)}, {count}, heads, head_dim] is needed")
    return packed.unbind(-3)


def split_heads(qkv: torch.Tensor, num_heads_q: int) -> tuple[torch.Tensor, ...]:
    """q, k, v of `[B, S, H + 2 * Hkv, D]`."""
    rest = 0 if qkv.dim() != 4 else qkv.shape[2] - num_heads_q
    if rest < 2 or rest % 2:
        raise ValueError(
            f"qkv: got {list(qkv.shape)} with num_heads_q={num_heads_q}; [batch, seqlen, {num_heads_q} + 2 * KV heads, "
            "head_dim] is needed"
        )
    return qkv.split([num_heads_q, rest // 2, rest // 2], dim=2)


def answer(out: torch.Tensor, lse: torch.Tensor | None, options: Options, return_attn_probs: bool):
    """What FlashAttention-2 returns: out, or (out, softmax_lse, S_dmask)."""
    if not return_attn_probs:
        return out
    if options.dropout:
        raise NotImplementedError(
            "return_attn_probs with dropout_p > 0 asks for the weights that were dropped (S_dmask), which are never "
            "formed. Give dropout_p=0"
        )
    return out, lse, out.new_empty(0)

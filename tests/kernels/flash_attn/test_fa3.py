"""FlashAttention-3's order of arguments, and its answers."""

import inspect

import pytest
import torch
from flashcore_kernels import flash_attn
from flashcore_kernels.flash_attn import fa3

from .test_dense import tensors
from .test_kvcache import Case
from .test_varlen import packed

# As hopper/flash_attn_interface.py has them.
SIGNATURES = {
    "flash_attn_func": "q k v softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk "
    "softcap num_splits pack_gqa deterministic sm_margin return_attn_probs",
    "flash_attn_qkvpacked_func": "qkv softmax_scale causal q_descale k_descale v_descale window_size attention_chunk "
    "softcap deterministic num_heads_q sm_margin return_attn_probs",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k "
    "softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk softcap num_splits pack_gqa "
    "deterministic sm_margin return_attn_probs",
    "flash_attn_with_kvcache": "q k_cache v_cache k v qv rotary_cos rotary_sin cache_seqlens cache_batch_idx "
    "cache_leftpad page_table cu_seqlens_q cu_seqlens_k_new max_seqlen_q rotary_seqlens q_descale k_descale v_descale "
    "softmax_scale causal window_size attention_chunk softcap rotary_interleaved scheduler_metadata num_splits "
    "pack_gqa sm_margin return_softmax_lse",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_order(name):
    parameters = inspect.signature(getattr(fa3, name)).parameters
    assert list(parameters) == SIGNATURES[name].split()
    other = inspect.signature(getattr(flash_attn, name)).parameters
    assert set(parameters) <= set(other), "FlashAttention-2's order has them too, by keyword"


def test_batches():
    q, k, v = tensors(dims=(4, 8))
    qv = torch.randn(2, 5, 4, 8, dtype=torch.float64)
    got, lse = fa3.flash_attn_func(q, k, v, 0.3, True, qv, None, None, None, (2, 1), 3, 2.0, return_attn_probs=True)
    want, want_lse, _ = flash_attn.flash_attn_func(
        q, k, v, softmax_scale=0.3, causal=True, qv=qv, window_size=(2, 1), attention_chunk=3, softcap=2.0,
        return_attn_probs=True,
    )  # fmt: skip
    assert torch.equal(got, want) and torch.equal(lse, want_lse)
    assert torch.equal(fa3.flash_attn_func(q, k, v), flash_attn.flash_attn_func(q, k, v))
    with pytest.raises(NotImplementedError, match="sm_margin"):
        fa3.flash_attn_func(q, k, v, sm_margin=1)


def test_packed():
    qkv = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    got, lse = fa3.flash_attn_qkvpacked_func(qkv, None, True, num_heads_q=4, return_attn_probs=True)
    want, want_lse, _ = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=4, return_attn_probs=True)
    assert torch.equal(got, want) and torch.equal(lse, want_lse)


def test_sequences():
    q, k, v, cu_q, cu_k = packed()
    used = cu_k.diff() // 2
    got, lse = fa3.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 7, None, used, 0.3, True, return_attn_probs=True)
    want, want_lse, _ = flash_attn.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 6, 7, seqused_k=used, softmax_scale=0.3, causal=True, return_attn_probs=True
    )
    assert torch.equal(got, want) and torch.equal(lse, want_lse)


def test_caches():
    one, other = Case("pages"), Case("pages")
    lengths, table = (one.arguments[name] for name in ("cache_seqlens", "block_table"))
    got, lse = fa3.flash_attn_with_kvcache(
        one.q, *one.caches, one.k, one.v, None, None, None, lengths, None, None, table, causal=True,
        return_softmax_lse=True,
    )  # fmt: skip
    want, want_lse = flash_attn.flash_attn_with_kvcache(
        other.q, *other.caches, other.k, other.v, causal=True, return_softmax_lse=True, **other.arguments
    )
    assert torch.equal(got, want) and torch.equal(lse, want_lse)

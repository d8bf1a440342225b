"""The function that Transformers calls in every layer: its arguments resolved, and one operator called."""

import torch
from flashcore_kernels import (
    Inputs,
    attend,
    count_path,
    device_of,
    naive_attention,
    note_fallback,
)

from . import as_sdpa
from .arguments import describe, refuse_unknown
from .layer_masks import add_bias, chosen_blocks, chosen_keys, document_ranges, fit_mask, keep, padding_range
from .masks import sdpa_would_leave_out
from .models import bias_is_zero, is_never_causal, offers_sdpa
from .pages import READ_FOR_PAGES, PagedCall, attend_pages, call_on_pages
from .range_mask import RangeMask, range_or_dense
from .stored_fp8 import StoredFp8


def flashcore_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    flashcore_pages: PagedCall | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention for one layer of a Transformers model.

    Args:
        module: the layer; its `is_causal` counts where the call does not say.
        query: `[B, H, Q, D]`, rotated.
        key, value: `[B, Hkv, K, D]` and `[B, Hkv, K, Dv]`, as the cache returned them.
        attention_mask: what `flashcore_mask` made, a KeyRange, a RangeMask or a bool mask; or a user's own 4-D mask,
            bool or additive; or a 2-D padding mask; or None: causal if the layer is (then K must be Q), else
            everything. A layer whose own `is_causal` is False sees everything where `sdpa` would, although its mask is
            causal: where nothing is padded.
        scaling: factor on the scores, D ** -0.5 where None.
        dropout: probability of dropping an attention weight, after the softmax.
        sliding_window: tokens that a query sees, itself included. Heeded only without a mask: masks have it in them.
        softcap, position_bias: softcap and an additive mask of `flashcore_kernels.attention`.
        s_aux or sinks: sink logits, `[H]`, or `[B, H, Q, 1]` where each query makes its own.
        indices: int `[B, Q, N]`, the keys that an indexer chose for each query; it sees no others (DeepSeek's sparse
            attention).
        block_indices: int `[B, I, Q, N]`, the blocks of `module.config.index_block_size` keys chosen for each query and
            group of H / I heads, -1 for none (MiniMax M3).
        cu_seq_lens_q, cu_seq_lens_k: int `[documents + 1]`, bounds of packed documents in one row.
        head_mask: what each head's weights are multiplied with after the softmax, `[H]`, or `[B or 1, H, Q or 1, 1]`.
        output_attentions: also return the weights, computed exactly by PyTorch for this call.
        flashcore_pages: where continuous batching keeps this layer's keys and values, if our stand-in for its cache's
            `update` was called. Transformers before 5.24 leaves that call to attention and hands on `cache`.

    Returns:
        output `[B, Q, H, Dv]`, and the weights `[B, H, Q, K]` in query's dtype (after dropout), or None.

    Raises:
        ValueError, NotImplementedError: the call asks for something that is not supported; the message says what.
    """
    if flashcore_pages is None and "cache" in kwargs:
        layer_idx = getattr(module, "layer_idx", None)
        flashcore_pages = call_on_pages(
            kwargs["cache"], layer_idx, {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k, **kwargs}
        )
    if flashcore_pages is not None:
        kwargs = {name: argument for name, argument in kwargs.items() if name not in READ_FOR_PAGES}
    refuse_unknown(kwargs)
    query, key, value = _in_model_dtype(module, query, key, value)
    sinks = sinks if s_aux is None else s_aux
    if flashcore_pages is not None:
        others = {
            "attention_mask": attention_mask, "position_bias": position_bias, "indices": indices,
            "block_indices": block_indices, "head_mask": head_mask, "output_attentions": output_attentions,
            "dropout": dropout,
        }  # fmt: skip
        _refuse_on_pages(others, sinks)
        output = attend_pages(
            query, key, value, flashcore_pages, causal=_is_causal(module, is_causal), sliding_window=sliding_window,
            scaling=scaling, softcap=softcap, sinks=sinks,
        )  # fmt: skip
        return output, None
    if not query.is_cuda:
        special = sinks, softcap, indices, block_indices, cu_seq_lens_q, head_mask, output_attentions or None
        if as_sdpa.serves(query, key, value, special):
            causal = _is_causal(module, is_causal)
            output = as_sdpa.attend_as_sdpa(
                module, query, key, value, attention_mask, position_bias, causal, sliding_window, scaling, dropout
            )
            if output is not None:
                return output, None
    own_sinks = None
    if sinks is not None and sinks.dim() == 4:
        own_sinks, sinks = sinks, None
    key_range = mask = key_scale = value_scale = window = None
    causal = False
    if key.dtype == torch.float8_e4m3fn:
        key, value, key_scale, value_scale = _opened(key, value)
    if attention_mask is not None:
        if not isinstance(attention_mask, torch.Tensor):
            raise NotImplementedError(_not_a_mask(attention_mask))
        not_causal = is_causal is None and not getattr(module, "is_causal", True)
        # UMT5's decoder forgets to say in 5.17 that it is causal; beside a bias `sdpa` would not leave the mask out.
        not_causal = not_causal and position_bias is None
        if not_causal and sdpa_would_leave_out(attention_mask) and offers_sdpa(type(module)):
            # Whoever takes the causality out of a layer gets from `sdpa` what no mask means there: everything.
            attention_mask = None
            key, value = key[:, :, : max(query.shape[2], 1)], value[:, :, : max(query.shape[2], 1)]
    if cu_seq_lens_q is not None:
        if query.shape[0] != 1:
            raise ValueError(f"cu_seq_lens_q describes one packed row, and query has batch size {query.shape[0]}")
        cu_seq_lens_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        key_range = document_ranges(
            query.shape[2], key.shape[2], cu_seq_lens_q, cu_seq_lens_k, _is_causal(module, is_causal), sliding_window
        )
    elif attention_mask is None:
        causal, window = _is_causal(module, is_causal), sliding_window
        _check_without_mask(query, key, causal)
        if not causal and query.shape[2] != key.shape[2]:
            window = None  # a canvas on a cache that is cut to the window already sees all of it (DiffusionGemma)
    elif isinstance(attention_mask, RangeMask):
        key_range, mask = _read_range_mask(attention_mask, query, key)
    elif attention_mask.dim() == 2:
        key_range = padding_range(attention_mask, query, key, _is_causal(module, is_causal), sliding_window)
    elif attention_mask.dtype == torch.int32:
        key_range = attention_mask
    else:
        mask = fit_mask(attention_mask, query, key)
    # Where gradients are on, even zeros may be there to have one.
    if position_bias is not None and (torch.is_grad_enabled() or not bias_is_zero(module)):
        mask = add_bias(position_bias, mask)
    if indices is not None:
        mask = keep(chosen_keys(indices, key.shape[2]), mask)
    if block_indices is not None:
        chosen = chosen_blocks(block_indices, module.config.index_block_size, query.shape[1], key.shape[2])
        mask = keep(chosen, mask)

    inputs = Inputs(query, key, value, key_range, mask, sinks, key_scale, value_scale)
    if output_attentions:
        count_path("torch")
        note_fallback("output_attentions=True asks for the weights, which the kernels never form")
        output, weights = naive_attention(
            query, key, value, key_range=key_range, mask=mask, is_causal=causal, window=window, scale=scaling,
            softcap=softcap, sinks=sinks if own_sinks is None else own_sinks, key_scale=key_scale,
            value_scale=value_scale, return_weights=True, dropout=dropout,
        )  # fmt: skip
        output, weights = output.transpose(1, 2), weights.to(query.dtype)
    else:
        output, lse = attend(inputs, causal, window, scaling, softcap, own_sinks is not None, dropout)
        weights = None
        if own_sinks is not None:
            # A sink adds exp(sink) to the denominator: the share that stays is exp(lse) / (exp(lse) + exp(sink)).
            share = torch.sigmoid(lse[..., None] - own_sinks.to(lse.dtype)).to(output.dtype)
            output = output * share.transpose(1, 2)
    if head_mask is not None:
        factor = _head_factor(head_mask, query.shape)
        output = output * factor.transpose(1, 2).to(output.dtype)
        weights = None if weights is None else weights * factor
    return output.contiguous(), weights


def _read_range_mask(
    range_mask: RangeMask, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(KeyRange, None), or (None, None) where nothing is hidden, or (None, the dense mask).

    The last where a model may have written into that, or where PyTorch computes: it would make one in each layer.
    """
    fits = range_mask.shape == (query.shape[0], 1, query.shape[2], key.shape[2])
    if torch.compiler.is_compiling():
        if not fits:
            return None, fit_mask(range_mask[:], query, key)
        answer = range_or_dense(range_mask)
        if answer.dtype == torch.bool:
            return None, answer
        return (None if range_mask.hides_nothing else answer), None
    if fits and range_mask._dense is None and device_of(query.device).kind != "torch":
        return (None if range_mask.hides_nothing else range_mask.key_range), None
    return None, fit_mask(range_mask.dense(), query, key)


def _is_causal(module: torch.nn.Module, said: bool | None) -> bool:
    """Whether a layer is causal, where no mask says what is seen: what the call said, else the layer itself."""
    causal = getattr(module, "is_causal", True) if said is None else said
    return causal and not is_never_causal(module)


def _not_a_mask(mask) -> str:
    return (
        f"flashcore got {describe(mask)} for an attention_mask. Supported are a 2-D padding mask, a 4-D mask (bool or "
        "added to the scores), and None. A BlockMask is flex_attention's: load this model with "
        "attn_implementation='flex_attention', or pass the mask as a bool tensor [B, 1, Q, K]."
    )


def _refuse_on_pages(others: dict, sinks: torch.Tensor | None) -> None:
    """Raise for what a layer asks beside pages."""
    asked = [name for name, argument in others.items() if argument is not None and argument is not False]
    asked = [name for name in asked if name != "dropout" or others[name]]
    if sinks is not None and sinks.dim() != 1:
        asked.append("sinks that each query makes")
    if asked:
        raise NotImplementedError(
            f"flashcore got {', '.join(asked)} in continuous batching, where it supports causal attention with "
            "windows, softcap and a sink a head. Call "
            "model.set_attn_implementation('sdpa') before model.generate_batch()."
        )


def _head_factor(head_mask: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A head mask as a factor that broadcasts to `[B, H, Q, 1]`: one that differs among keys would need the weights."""
    factor = head_mask[:, None, None] if head_mask.dim() == 1 else head_mask
    batch_size, num_heads, num_queries, _ = shape
    full = (batch_size, num_heads, num_queries, 1)
    if factor.dim() not in (3, 4) or any(size not in (1, want) for size, want in zip(factor.shape[::-1], full[::-1])):
        raise NotImplementedError(
            f"flashcore got a head_mask of shape {list(head_mask.shape)}. Supported is a factor for each of the "
            f"{num_heads} heads, [{num_heads}] or [1, {num_heads}, 1, 1]. Load this model with "
            "attn_implementation='eager'."
        )
    return factor if factor.dim() == 4 else factor[None]


def _in_model_dtype(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What torch.autocast does to SDPA's inputs; and where a 16-bit model is left fp32 ones, its own dtype.

    PEFT keeps norms and adapters in fp32, so that queries and keys come in fp32 beside projections in 16 bits. The
    flash function of Transformers asks the same of a layer (`get_target_dtype`).
    """
    if _autocasts(query):
        dtype = torch.get_autocast_dtype("cuda" if query.is_cuda else query.device.type)
        query, key, value = (t if t.dtype == torch.float8_e4m3fn else t.to(dtype) for t in (query, key, value))
    if query.dtype != torch.float32 or key.dtype == torch.float8_e4m3fn:
        return query, key, value
    config = getattr(module, "config", None)
    if hasattr(config, "_is_quantized"):
        dtype = config.dtype
    else:
        dtype = _first_linear_dtype(module)
    if dtype not in (torch.float16, torch.bfloat16):  # weights in fewer bits still are quantised ones
        return query, key, value
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _first_linear_dtype(module: torch.nn.Module) -> torch.dtype:
    """Of the weights of a layer's first linear part; float32 where it has none."""
    for child in module._modules.values():  # quicker than modules(), which remembers what it has seen
        if isinstance(child, torch.nn.Linear):
            return child.weight.dtype
        if child is not None and child._modules:
            break
    layers = (each.weight.dtype for each in module.modules() if isinstance(each, torch.nn.Linear))
    return next(layers, torch.float32)


def _autocasts(query: torch.Tensor) -> bool:
    """Whether torch.autocast is on where this tensor is."""
    if query.is_cuda:
        return torch.is_autocast_enabled("cuda")
    device_type = query.device.type
    # Other devices, such as meta, have none, and asking for it raises. Not every torch.compile can trace this question.
    has_autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return has_autocast and torch.is_autocast_enabled(device_type)


def _opened(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(key, value, key_scale, value_scale) of what a FlashCoreCache in fp8 returned; scales are float32 `[B, Hkv]`."""
    if not (isinstance(key, StoredFp8) and isinstance(value, StoredFp8)):
        raise ValueError(
            "key and value are in float8_e4m3fn and have no scales, which a FlashCoreCache hands on with them. "
            "Use FlashCoreCache without dtype, or a DynamicCache"
        )
    return key.stored, value.stored, key.flashcore_scale, value.flashcore_scale


def _check_without_mask(query: torch.Tensor, key: torch.Tensor, causal: bool) -> None:
    """Raise where a call without a mask could mean two things."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if causal and num_queries > 1 and num_queries != num_keys:
        raise ValueError(
            f"attention_mask is None with {num_queries} causal queries on {num_keys} keys: that can mean the first or "
            "the last of the keys. Pass the 2-D attention_mask of the whole text to the model, or a 4-D mask."
        )

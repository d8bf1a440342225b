"""The function that Transformers calls in every layer: its arguments resolved, and one operator called."""

import torch
from flashcore_kernels import make_key_range, make_row_ranges, naive_attention
from flashcore_kernels.fallback import note_fallback, torch_attention
from flashcore_kernels.op import attend, path_counts
from flashcore_kernels.problem import check_problem

from .quantize import StoredFp8

# Keywords that ride along through Transformers' layers and say nothing that attention would have to heed: positions
# are in query and key already, and which keys exist is in the mask.
_NOT_OURS = frozenset(
    "position_ids cache_position position_embeddings use_cache output_hidden_states output_router_logits return_dict "
    "deterministic max_length_q max_length_k max_seqlen max_seqlen_q max_seqlen_k num_items_in_batch logits_to_keep "
    "labels past_key_values past_key_value layer_idx encoder_hidden_states encoder_attention_mask input_ids "
    "inputs_embeds token_type_ids mm_token_type_ids grid_thw".split()
)

# Files whose layers are, or by default seem, causal where no mask means that everything is seen; eager does not ask.
_NOT_CAUSAL = frozenset({"modeling_bridgetower", "modeling_chinese_clip", "modeling_kosmos2"})


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
    output_attentions: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention for one layer of a Transformers model.

    Args:
        module: the layer; its `is_causal` counts where the call does not say.
        query: `[B, H, Q, D]`, rotated.
        key, value: `[B, Hkv, K, D]` and `[B, Hkv, K, Dv]`, as the cache returned them.
        attention_mask: what `flashcore_mask` made, a KeyRange or a bool mask; or a user's own 4-D mask, bool or
            additive; or a 2-D padding mask; or None: causal if the layer is (then K must be Q), else everything.
        scaling: factor on the scores, D ** -0.5 where None.
        dropout: probability of dropping an attention weight; above 0 PyTorch serves the call.
        sliding_window: tokens that a query sees, itself included. Heeded only without a mask: masks have it in them.
        softcap, position_bias: softcap and an additive mask of `flashcore_kernels.attention`.
        s_aux or sinks: sink logits, `[H]`, or `[B, H, Q, 1]` where each query makes its own.
        indices: int `[B, Q, N]`, the keys that an indexer chose for each query; it sees no others (DeepSeek's sparse
            attention).
        block_indices: int `[B, I, Q, N]`, the blocks of `module.config.index_block_size` keys chosen for each query and
            group of H / I heads, -1 for none (MiniMax M3).
        cu_seq_lens_q, cu_seq_lens_k: int `[documents + 1]`, bounds of packed documents in one row.
        output_attentions: also return the weights, computed exactly by PyTorch for this call.

    Returns:
        output `[B, Q, H, Dv]`, and the weights `[B, H, Q, K]` in query's dtype, or None.

    Raises:
        ValueError, NotImplementedError: the call asks for something that is not supported; the message says what.
    """
    _refuse_unknown(kwargs)
    query, key, value = _autocast(query, key, value)
    sinks = sinks if s_aux is None else s_aux
    own_sinks = None
    if sinks is not None and sinks.dim() == 4:
        own_sinks, sinks = sinks, None
    key_range = mask = key_scale = value_scale = window = None
    causal = False
    if key.dtype == torch.float8_e4m3fn:
        key, value, key_scale, value_scale = _opened(key, value)
    if cu_seq_lens_q is not None:
        if query.shape[0] != 1:
            raise ValueError(f"cu_seq_lens_q describes one packed row, and query has batch size {query.shape[0]}")
        cu_seq_lens_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        key_range = _document_ranges(
            query.shape[2], key.shape[2], cu_seq_lens_q, cu_seq_lens_k, _is_causal(module, is_causal), sliding_window
        )
    elif attention_mask is None:
        causal, window = _is_causal(module, is_causal), sliding_window
        _check_without_mask(query, key, causal)
        if not causal and query.shape[2] != key.shape[2]:
            window = None  # a canvas on a cache that is cut to the window already sees all of it (DiffusionGemma)
    elif attention_mask.dim() == 2:
        key_range = _padding_range(attention_mask, query, key, _is_causal(module, is_causal), sliding_window)
    elif attention_mask.dtype == torch.int32:
        key_range = attention_mask
    else:
        mask = _fit_mask(attention_mask, key.shape[2])
    if position_bias is not None:
        mask = _add_bias(position_bias, mask)
    if indices is not None:
        mask = _keep(_chosen_keys(indices, key.shape[2]), mask)
    if block_indices is not None:
        chosen = _chosen_blocks(block_indices, module.config.index_block_size, query.shape[1], key.shape[2])
        mask = _keep(chosen, mask)

    if not (output_attentions or dropout):
        # By position: in a decode layer, names cost as much as checking them.
        output, lse = attend(
            query, key, value, key_range, mask, causal, window, scaling, softcap, sinks, key_scale, value_scale,
            own_sinks is not None,
        )  # fmt: skip
        if own_sinks is not None:
            # A sink adds exp(sink) to the denominator: the share that stays is exp(lse) / (exp(lse) + exp(sink)).
            share = torch.sigmoid(lse[..., None] - own_sinks.to(lse.dtype)).to(output.dtype)
            output = output * share.transpose(1, 2)
        return output.contiguous(), None
    if own_sinks is not None:
        raise NotImplementedError(
            "flashcore has no weights and no dropout where every query makes its own sink; "
            "load this model with attn_implementation='eager'"
        )
    path_counts["torch"] += 1
    if output_attentions:
        note_fallback("output_attentions=True asks for the weights, which the kernels never form")
        output, weights = naive_attention(
            query, key, value, key_range=key_range, mask=mask, is_causal=causal, window=window, scale=scaling,
            softcap=softcap, sinks=sinks, key_scale=key_scale, value_scale=value_scale, return_weights=True,
        )  # fmt: skip
        return output.transpose(1, 2).contiguous(), weights.to(query.dtype)
    note_fallback("dropout is asked for, which the kernels do not have")
    problem = check_problem(
        query, key, value, key_range, mask, causal, window, scaling, softcap, sinks, key_scale, value_scale
    )
    output, _ = torch_attention(
        problem, query, key, value, key_range, mask, sinks, dropout=dropout, key_scale=key_scale,
        value_scale=value_scale,
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


def _is_causal(module: torch.nn.Module, said: bool | None) -> bool:
    """Whether a layer is causal, where no mask says what is seen: what the call said, else the layer itself."""
    causal = getattr(module, "is_causal", True) if said is None else said
    return causal and type(module).__module__.rpartition(".")[2] not in _NOT_CAUSAL


def _refuse_unknown(kwargs: dict) -> None:
    """What we do not know may change the answer, unless it is switched off (None or False)."""
    for name, argument in kwargs.items():
        if name in _NOT_OURS or argument is None or argument is False:
            continue
        what = f"a tensor of shape {list(argument.shape)}" if isinstance(argument, torch.Tensor) else repr(argument)
        raise NotImplementedError(
            f"flashcore got the attention argument '{name}' ({what}), which it does not know and would have to ignore. "
            "Load this model with attn_implementation='eager' or 'sdpa'."
        )


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What torch.autocast does to SDPA's inputs."""
    device_type = "cuda" if tensors[0].is_cuda else tensors[0].device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        return tuple(t if t.dtype == torch.float8_e4m3fn else t.to(dtype) for t in tensors)
    return tensors


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


def _padding_range(
    padding: torch.Tensor, query: torch.Tensor, key: torch.Tensor, causal: bool, window: int | None
) -> torch.Tensor:
    """A KeyRange from a 2-D padding mask `[B, L]`, which some models hand to whatever has "flash" in its name.

    The queries are the last of the L tokens; key slots beyond L (of a static cache) are unfilled.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    length = padding.shape[1]
    if not num_queries <= length <= num_keys and causal:
        raise ValueError(
            f"attention_mask {list(padding.shape)} does not fit {num_queries} queries on {num_keys} keys: "
            "a 2-D mask has a column for each token so far"
        )
    left = -1 if window is None else window - 1
    return make_key_range(
        query.shape[0], num_keys, query_start=length - num_queries, left=left, right=0 if causal else left,
        key_mask=torch.nn.functional.pad(padding.to(torch.bool), (0, num_keys - length)),
    )  # fmt: skip


def _fit_mask(mask: torch.Tensor, num_keys: int) -> torch.Tensor:
    """A user's own mask may be longer than the keys, as eager allows."""
    if mask.dim() == 4 and mask.shape[3] > num_keys:
        return mask[..., :num_keys]
    return mask


def _add_bias(bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """One additive mask from a position bias and what there is of a mask."""
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _keep(chosen: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What there is of a mask (or of a bias), and the chosen keys alone."""
    if mask is None:
        return chosen
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, -torch.inf)


def _chosen_keys(indices: torch.Tensor, num_keys: int) -> torch.Tensor:
    """bool `[B, 1, Q, K]` from the chosen keys of each query, `[B, Q, N]`."""
    chosen = torch.zeros(*indices.shape[:2], num_keys, dtype=torch.bool, device=indices.device)
    return chosen.scatter(-1, indices.long(), True)[:, None]


def _chosen_blocks(indices: torch.Tensor, block_size: int, num_heads: int, num_keys: int) -> torch.Tensor:
    """bool `[B, H, Q, K]` from the chosen blocks of each query and group of heads, `[B, I, Q, N]`."""
    num_blocks = -(-num_keys // block_size)
    # Slots that hold -1 fall into a column of their own, which is cut off.
    chosen = torch.zeros(*indices.shape[:3], num_blocks + 1, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter(-1, indices.long().masked_fill(indices < 0, num_blocks), True)[..., :num_blocks]
    chosen = chosen.repeat_interleave(block_size, dim=-1)[..., :num_keys]
    return chosen.repeat_interleave(num_heads // indices.shape[1], dim=1)


def _document_ranges(
    num_queries: int, num_keys: int, cu_q: torch.Tensor, cu_k: torch.Tensor, causal: bool, window: int | None
) -> torch.Tensor:
    """A range for each query of one packed row; the queries of a document are its last tokens."""
    cu_q, cu_k = cu_q.to(torch.int64), cu_k.to(torch.int64)
    token = torch.arange(num_queries, device=cu_q.device)
    document = torch.searchsorted(cu_q, token, right=True) - 1  # [Q]
    document = document.clamp(max=cu_q.shape[0] - 2)
    first, end = cu_k[document], cu_k[document + 1]
    slot = end - (cu_q[document + 1] - token)  # where in the keys this query stands
    if window is not None:
        first, end_window = torch.maximum(first, slot - window + 1), slot + window
        end = end if causal else torch.minimum(end, end_window)
    if causal:
        end = torch.minimum(end, slot + 1)
    # Tokens behind the last document see nothing.
    end = torch.where(token < cu_q[-1], end, first)
    return make_row_ranges(first[None], end[None], num_keys)

"""The definition: attention in plain PyTorch, in any dtype. Slow, differentiable, and the reference of all tests."""

import torch

from .key_range import visible
from .problem import Inputs, Problem, Window, check_problem


def naive_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    key_range: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    probability_dtype: torch.dtype | None = None,
    return_weights: bool = False,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(cap(scale * Q K^T) + mask) V over the keys that each query sees.

    cap(s) is softcap * tanh(s / softcap). A sink adds exp(sink) to a row's denominator and nothing to its sum. A query
    that sees no key gives zeros and an lse of -inf (of its sink, where there is one). Keys and values that no query of
    the sequence sees do not matter, whatever they hold, NaN included.

    Args: as `flashcore_kernels.attention`, and:
        dtype: of the arithmetic; by default float64 for float64 inputs, else float32.
        probability_dtype: round the probabilities to this before the product with V, as fused kernels do.
        sinks: also `[B, H, Q, 1]`, a logit for each query.
        return_weights: return the probabilities `[B, H, Q, K]` (in `dtype`) in place of the lse, after dropout.
        dropout: set each probability to 0 with this chance, and divide what stays by 1 - dropout. The softmax comes
            first, sinks included, so neither lse nor a sink's share changes.

    Returns:
        output `[B, H, Q, Dv]` in query's dtype, and lse `[B, H, Q]` (natural logarithm, sinks included) in `dtype`.
    """
    for_heads = None if sinks is not None and sinks.dim() == 4 else sinks
    inputs = Inputs(query, key, value, key_range, mask, for_heads, key_scale, value_scale)
    problem = check_problem(inputs, is_causal, window, scale, softcap)
    if dtype is None:
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if problem.fp8:
        key, value = dequantized(key, key_scale, dtype), dequantized(value, value_scale, dtype)
    seen = visible_mask(problem, query.device, key_range, mask)  # [B or 1, H or 1, Q, K]
    key, value = hide_unseen(problem, key.to(dtype), value.to(dtype), seen)
    # Queries that see nothing may be NaN too, and would be 0 * NaN in key's gradient.
    query = query.masked_fill(~seen.any(dim=-1, keepdim=True), 0.0)
    key = key.repeat_interleave(problem.group, dim=1)  # [B, H, K, D]
    value = value.repeat_interleave(problem.group, dim=1)  # [B, H, K, Dv]

    scores = query.to(dtype) @ key.transpose(-1, -2) * problem.scale  # [B, H, Q, K]
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if problem.mask_kind == "float":
        scores = scores + mask.to(dtype)
    scores = scores.masked_fill(~seen, -torch.inf)
    logits = scores
    if sinks is not None:
        sinks = sinks if for_heads is None else sinks[:, None, None]
        logits = torch.cat([scores, sinks.to(dtype).expand(*scores.shape[:3], 1)], dim=-1)
    lse = torch.logsumexp(logits, dim=-1)  # [B, H, Q]
    # exp(-inf - -inf) is NaN; rows without a key have weight 0 everywhere.
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    rounded = weights if probability_dtype is None else weights.to(probability_dtype).to(dtype)
    output = (rounded @ value).to(query.dtype)
    return output, (weights if return_weights else lse)


def dequantized(states: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """e4m3 `[B, Hkv, K, D]` multiplied with `[B, Hkv]`, in `dtype`."""
    return (states.to(torch.float32) * scale[:, :, None, None]).to(dtype)


def visible_mask(
    problem: Problem, device: torch.device, key_range: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor:
    """bool `[B or 1, H or 1, Q, K]`: which keys each query sees, by the KeyRange or window, and by the mask."""
    num_queries, num_keys = problem.num_queries, problem.num_keys
    if key_range is not None:
        seen = visible(key_range, num_queries, num_keys)
    else:
        query = problem.query_start + torch.arange(num_queries, device=device)
        distance = torch.arange(num_keys, device=device) - query[:, None]  # [Q, K]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if problem.left >= 0:
            seen = seen & (distance >= -problem.left)
        if problem.right >= 0:
            seen = seen & (distance <= problem.right)
        seen = seen[None, None]
    if problem.mask_kind == "bool":
        seen = seen & mask
    elif problem.mask_kind == "float":
        seen = seen & (mask > -torch.inf)
    return seen


def hide_unseen(
    problem: Problem, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero the keys and values that no query of their sequence and KV head sees, so that 0 * NaN never happens."""
    needed = seen.any(dim=2)  # [B or 1, H or 1, K]
    if needed.shape[1] > 1:
        needed = needed.unflatten(1, (problem.num_kv_heads, problem.group)).any(dim=2)  # [B or 1, Hkv, K]
    return key.masked_fill(~needed[..., None], 0.0), value.masked_fill(~needed[..., None], 0.0)

"""The backward's definition in plain PyTorch, in any dtype: slow, and what serves where no kernel can."""

import torch

from ..naive import hide_unseen, visible_mask
from ..problem import Inputs, Problem


def naive_backward(
    problem: Problem,
    inputs: Inputs,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None = None,
    *,
    sinks_grad: bool = False,
    mask_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dq, dk, dv, dsinks, dmask) of an attention call, by the formulas of `run_backward` and with its arguments."""
    query, key, value, key_range, mask, sinks = inputs[:6]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    seen = visible_mask(problem, query.device, key_range, mask)  # [B or 1, H or 1, Q, K]
    k, v = hide_unseen(problem, key.to(dtype), value.to(dtype), seen)
    k, v = (t.repeat_interleave(problem.group, dim=1) for t in (k, v))  # [B, H, K, D or Dv]
    # Rows that see nothing: their queries may hold NaN, and 0 * NaN is NaN.
    sees = seen.any(dim=-1, keepdim=True)
    q = query.to(dtype).masked_fill(~sees, 0.0)
    grad = grad_output.to(dtype).masked_fill(~sees, 0.0)  # [B, H, Q, Dv]

    scores = q @ k.transpose(-1, -2) * problem.scale  # [B, H, Q, K]
    slope = None
    if problem.softcap:
        t = torch.tanh(scores / problem.softcap)
        scores, slope = problem.softcap * t, 1.0 - t * t
    if problem.mask_kind == "float":
        scores = scores + mask.to(dtype)
    lse = lse.to(dtype)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]).masked_fill(~seen, 0.0)
    delta = (grad * output.to(dtype)).sum(-1)  # [B, H, Q]
    if grad_lse is not None:
        delta = delta - grad_lse.to(dtype)
    of_scores = weights * (grad @ v.transpose(-1, -2) - delta[..., None])  # [B, H, Q, K]

    dsinks = dmask = None
    if sinks_grad:
        share = torch.exp(sinks.to(dtype)[None, :, None] - lse).masked_fill(lse == -torch.inf, 0.0)
        dsinks = -(share * delta).sum(dim=(0, 2)).to(sinks.dtype)
    if mask_grad:
        dmask = of_scores.sum_to_size(mask.shape).to(mask.dtype)
    if slope is not None:
        of_scores = of_scores * slope
    dq = of_scores @ k * problem.scale
    heads = (problem.num_kv_heads, problem.group)
    dk = (of_scores.transpose(-1, -2) @ q * problem.scale).unflatten(1, heads).sum(2)  # [B, Hkv, K, D]
    dv = (weights.transpose(-1, -2) @ grad).unflatten(1, heads).sum(2)  # [B, Hkv, K, Dv]
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), dsinks, dmask

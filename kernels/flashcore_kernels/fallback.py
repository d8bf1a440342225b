"""The same answers through PyTorch, where no kernel can serve; and the one place that says so."""

import os
import warnings

import torch
import torch.nn.functional as F

from .naive import dequantized, hide_unseen, naive_attention, visible_mask
from .problem import Inputs, Problem

_warned: set[str] = set()


class FlashcoreFallbackWarning(UserWarning):
    """A call was served by PyTorch instead of a kernel: the same answer, slower. Given once for each reason."""


@torch.compiler.assume_constant_result
def note_fallback(reason: str) -> None:
    """Say once that PyTorch serves a call and why; under `FLASHCORE_STRICT=1` raise instead.

    Raises:
        NotImplementedError: with FLASHCORE_STRICT=1.
    """
    message = f"flashcore serves this attention call through PyTorch: {reason}."
    if os.environ.get("FLASHCORE_STRICT", "0") not in ("", "0"):
        raise NotImplementedError(message + " FLASHCORE_STRICT=1 makes that an error; unset it to allow the fallback.")
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(message + " FLASHCORE_STRICT=1 makes this an error.", FlashcoreFallbackWarning, stacklevel=3)


def forget_warnings() -> None:
    """Let every reason be said once more (tests use this)."""
    _warned.clear()


def torch_attention(
    problem: Problem, inputs: Inputs, return_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by PyTorch's own operators: any dtype and device, with gradients and dropout.

    Args:
        problem: what `inputs` ask; its window counts where there is no KeyRange. Its dropout does not change lse.
        inputs: sinks may be `[B, H, Q, 1]` too, a logit for each query.

    Returns:
        output `[B, H, Q, Dv]`; lse `[B, H, Q]` (float64 for float64 inputs, else float32) or None.
    """
    query, key, value, key_range, mask, sinks, key_scale, value_scale, _ = inputs
    if problem.fp8:
        key, value = dequantized(key, key_scale, query.dtype), dequantized(value, value_scale, query.dtype)
    sdpa_can = not (problem.softcap or sinks is not None or return_lse or problem.head_dim != problem.value_dim)
    if not sdpa_can:
        # One of the two spellings of what is visible is in the KeyRange already.
        window = None if key_range is not None else (problem.left, problem.right)
        output, lse = naive_attention(
            query, key, value, key_range=key_range, mask=mask, window=window, scale=problem.scale,
            softcap=problem.softcap, sinks=sinks, dropout=problem.dropout,
        )  # fmt: skip
        return output, (lse if return_lse else None)

    seen = visible_mask(problem, query.device, key_range, mask)  # [B or 1, H or 1, Q, K]
    key, value = hide_unseen(problem, key, value, seen)
    # A softmax over no key is NaN, and so are its gradients: such rows look at everything, and are zeroed after.
    empty = ~seen.any(dim=-1, keepdim=True)
    attend = seen | empty
    query = query.masked_fill(empty, 0.0)
    if problem.mask_kind == "float":
        attend = torch.zeros_like(mask).expand(torch.broadcast_shapes(mask.shape, attend.shape)).masked_fill(
            ~attend, -torch.inf
        ) + mask.masked_fill(empty, 0.0)
        attend = attend.to(query.dtype)
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attend,
        dropout_p=problem.dropout,
        scale=problem.scale,
        enable_gqa=problem.group > 1,
    )
    return output.masked_fill(empty, 0.0), None

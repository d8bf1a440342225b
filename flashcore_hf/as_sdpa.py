"""Where PyTorch computes on a CPU: the very calls that `sdpa` makes, held to our promise about NaN in padding.

A call that does not fit goes the ordinary way, through flashcore_kernels, which is always right: `attend_as_sdpa` then
answers None.
"""

import functools
import math

import torch
from flashcore_kernels import count_path, device_of, nobody_listens, note_fallback

from .compat import attention_registry
from .layer_masks import add_bias, fit_mask
from .masks import is_left_out
from .range_mask import RangeMask


def serves(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, special: tuple) -> bool:
    """Whether PyTorch computes attention of these tensors on a CPU, operator by operator, and none is special in it."""
    return (
        not torch.compiler.is_compiling()
        and query.device.type == "cpu"
        and special.count(None) == len(special)
        and query.dtype == key.dtype == value.dtype
        and nobody_listens(query, key, value)
        and device_of(query.device).kind == "torch"
    )


def attend_as_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    causal: bool,
    window: int | None,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor | None:
    """Output `[B, Q, H, Dv]` by the function that is registered as `sdpa`, or None where the call does not fit.

    Args:
        attention_mask: as flashcore_attention gets it.
        position_bias: additive, broadcastable to `[B, H, Q, K]`.
        causal: whether the layer is, or the call says so.
        window: of a call without a mask.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    if key.shape[1] * getattr(module, "num_key_value_groups", 1) != query.shape[1]:
        return None  # `sdpa` asks the layer, we the tensors
    mask = attention_mask
    if mask is None:
        if (causal and num_queries not in (1, num_keys)) or (window is not None and window < num_keys):
            return None
    elif not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return None
    else:
        left_out, left_out_causal = is_left_out(mask, num_queries, num_keys)
        if left_out and left_out_causal and not causal:
            return None  # a layer that is not causal under a causal mask: what it sees depends on its model
        if not left_out and (mask.dtype == torch.int32 or isinstance(mask, RangeMask)):
            return None
        mask, causal = (None, left_out_causal) if left_out else (mask, False)
    if position_bias is not None:
        if causal and num_queries > 1:
            return None
        mask = add_bias(position_bias, mask)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (query.shape[0], 1, num_queries, num_keys)):
        mask = fit_mask(mask, query, key)
        if not _broadcasts(mask, query, key) or (mask.dtype != torch.bool and mask.dtype != query.dtype):
            return None
    requires_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if requires_grad and mask is not None and not _gradients_of_nothing_are_zero(query.dtype):
        return None
    output, _ = attention_registry()["sdpa"](
        module, query, key, value, mask, dropout=dropout, scaling=scaling,
        is_causal=causal and num_queries > 1 and mask is None,
    )  # fmt: skip
    if mask is not None and not _is_clean(output, key, value, requires_grad):
        return None
    note_fallback(device_of(query.device).reason)
    count_path("torch")
    return output


def _broadcasts(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> bool:
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return mask.dim() == 4 and all(size in (1, want) for size, want in zip(mask.shape, full))


def _is_clean(output: torch.Tensor, key: torch.Tensor, value: torch.Tensor, requires_grad: bool) -> bool:
    """Whether keys and values that the mask hides cannot have changed anything: there 0 times NaN would be NaN.

    A key that is not finite shows in the sum of keys, such a value in the output, to which all values contribute. With
    gradients values so large that their product with an output's gradient overflows count too: their norm overflows.
    """
    if requires_grad:
        output, key, value = output.detach(), key.detach(), value.detach()
        norms = torch.linalg.vector_norm(key) + torch.linalg.vector_norm(value)
        if not math.isfinite(norms.item()):
            return False
    # Half precision is added up in float32, whose sum of finite numbers is finite.
    dtype = torch.float32 if output.dtype.itemsize < 4 else None
    return math.isfinite(output.sum(dtype=dtype).item()) and math.isfinite(key.sum(dtype=dtype).item())


@functools.cache
def _gradients_of_nothing_are_zero(dtype: torch.dtype) -> bool:
    """Whether this PyTorch's SDPA gives a query that sees no key zeros, and zero gradients: asked by trying."""
    with torch.enable_grad():
        tensors = [torch.ones(1, 1, 2, 16, dtype=dtype, requires_grad=True) for _ in range(3)]
        mask = torch.tensor([[False, False], [True, True]])
        output = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
        grads = torch.autograd.grad(output.sum(), tensors)
    return not output[0, 0, 0].any() and not grads[0][0, 0, 0].any() and all(grad.isfinite().all() for grad in grads)

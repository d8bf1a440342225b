"""The operators: `attention` for callers, and `torch.ops.flashcore.attention`, which torch.compile keeps whole."""

import torch
from torch._decomp import register_decomposition
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .autograd import draw_philox, flash_attn_fwd
from .choose import backward_fallback_reason, choose, choose_backward
from .counting import count_path, path_counts
from .device import Device, device_of
from .dispatch import empty_outputs
from .fallback import note_fallback, torch_attention
from .problem import (
    Inputs,
    Problem,
    Window,
    any_requires_grad,
    check_problem,
    number,
    problem_of_numbers,
    split_arguments,
    with_alignment,
)
from .run import first_of_its_kind, run
from .runtime.prepared import find
from .training import attend_in_training


def attention(
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
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Grouped-query attention: softmax(cap(scale * Q K^T) + mask) V over the keys that each query sees.

    Without a KeyRange the queries are the last tokens: query i of Q stands at key slot K - Q + i.

    Args:
        query: `[B, H, Q, D]`, any strides with a unit innermost one (another layout is copied).
        key: `[B, Hkv, K, D]`; H must be a multiple of Hkv. Query head h reads KV head h // (H / Hkv).
        value: `[B, Hkv, K, Dv]`.
        key_range: int32 KeyRange that says what each query sees (see `make_key_range`), on query's device. It already
            says causal and window, which must then be left out.
        mask: broadcastable to `[B, H, Q, K]`: bool (True: may attend), or floating point, added to the scaled scores.
            It narrows what key_range, is_causal and window leave.
        is_causal: query at slot p sees keys up to p.
        window: w >= 1: the w nearest keys, itself included (only backwards when causal; else w - 1 to each side);
            or a pair (left, right) of distances, -1 for no limit.
        scale: factor on Q K^T; D ** -0.5 where None.
        softcap: c > 0 replaces scores s by c * tanh(s / c).
        sinks: `[H]` logits that enter each head's denominator (and its lse) and nothing else.
        key_scale, value_scale: float32 `[B, Hkv]`, for key and value in float8_e4m3fn: what their elements are
            multiplied with. Query keeps its dtype. The kernels read e4m3 as fp16, and form no dequantised copy.
        dropout: probability, in [0, 1), with which each weight is dropped after the softmax; those that stay are
            divided by 1 - dropout. Drawn from PyTorch's generator of query's device; lse does not change by it.
        return_lse: also return the log-sum-exp.

    Gradients flow to query, key, value, sinks and an additive mask, also through lse. They have the same bits in every
    run. There are none of gradients.

    Returns:
        output `[B, H, Q, Dv]` in query's dtype, laid out so that `output.transpose(1, 2)` is contiguous; with
        return_lse also `[B, H, Q]`: natural logarithm of each row's denominator, float32 (float64 for float64 inputs).
        A query that sees no key gives zeros.

    Raises:
        ValueError: an argument does not fit; the message names it, what it was, and what is accepted.
        NotImplementedError: FLASHCORE_STRICT=1 is set and no kernel can serve the call.
    """
    inputs = Inputs(query, key, value, key_range, mask, sinks, key_scale, value_scale)
    output, lse = attend(inputs, is_causal, window, scale, softcap, return_lse, dropout)
    output = output.transpose(1, 2)
    return (output, lse) if return_lse else output


def attend(
    inputs: Inputs,
    is_causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention` for callers that want output as models do, `[B, Q, H, Dv]` (contiguous where a kernel wrote it).

    lse is `[B, H, Q]` with return_lse, and means nothing without.
    """
    # Remembered calls know a number by its value, and a tensor by its identity alone: it may change in place.
    if isinstance(scale, torch.Tensor):
        scale = number("scale", scale)
    if isinstance(softcap, torch.Tensor):
        softcap = number("softcap", softcap)
    signature = None
    if not dropout and not torch.compiler.is_compiling():
        signature, known = find(inputs, (is_causal, window, scale, softcap, return_lse))
        if known is not None:
            kernel, call = known
            path_counts[kernel] += 1
            return call(inputs)
    if signature is None and not torch.compiler.is_compiling():
        served = attend_in_training(inputs, is_causal, window, scale, softcap, dropout)
        if served is not None:
            return served
    problem = check_problem(inputs, is_causal, window, scale, softcap, dropout)
    if dropout:
        return _dropped(problem, inputs, return_lse)
    # Nobody listens to the dispatcher, and the kernels take the tensors as they are: straight to a launch.
    if signature is not None and problem.scale > 0.0 and all(t.stride(3) == 1 for t in inputs[:3]):
        problem = with_alignment(problem, inputs)
        plan = choose(problem, device_of(inputs.query.device))
        if plan.kernel != "torch":
            path_counts[plan.kernel] += 1
            return first_of_its_kind(signature, plan, problem, inputs, return_lse)
    output, lse = torch.ops.flashcore.attention(
        *inputs[:4], inputs.mask, inputs.sinks, problem.left, problem.right, problem.scale, problem.softcap, return_lse,
        inputs.key_scale, inputs.value_scale,
    )  # fmt: skip
    return output.transpose(1, 2), lse


@torch.compiler.assume_constant_result
def _known_device(device: torch.device) -> Device:
    """`device_of`, which torch.compile cannot trace."""
    return device_of(device)


def _dropped(problem: Problem, inputs: Inputs, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attend` with dropout."""
    reason = backward_fallback_reason(problem, _known_device(inputs.query.device))
    if any_tangent(*(t for t in inputs if t is not None)):
        reason = TANGENTS
    if reason is None:
        inputs = inputs._replace(philox=draw_philox(inputs.query.device))
        output, lse = flash_attn_fwd(problem, inputs)
    else:
        note_fallback(reason)
        count_path("torch")
        output, lse = torch_attention(problem, inputs, return_lse)
    return output.transpose(1, 2), lse


def explain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, device: Device | None = None, **arguments
) -> str:
    """Which kernel `attention` would run for these arguments, with which configuration, and why: one line.

    A second line says the same of its backward, where an argument requires a gradient.

    Args: as `attention`; `device` asks about another device than the tensors', such as `Device("cuda", 90)`.
    """
    inputs, options = split_arguments(query, key, value, **arguments)
    problem = with_alignment(check_problem(inputs, **options), inputs)
    device = device or device_of(query.device)
    plan = choose(problem, device)
    lines = [f"torch: {plan.reason}"]
    if plan.kernel != "torch":
        config = plan.config
        tiles = f"{config.block_m}x{config.block_n}, {config.num_warps} warps, {config.num_stages} stages"
        lines = [f"{plan.kernel} ({tiles}): {plan.reason}"]
    if torch.is_grad_enabled() and any_requires_grad(*inputs):
        plan = choose_backward(problem, device)
        lines.append(f"{plan.kernel}: {plan.reason}")
    return "\n".join(lines)


_library = torch.library.Library("flashcore", "DEF")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? key_range, Tensor? mask, Tensor? sinks, "
    "int left, int right, float scale, float softcap, bool return_lse, Tensor? key_scale=None, "
    "Tensor? value_scale=None) -> (Tensor, Tensor)"
)


def _asked(
    query, key, value, key_range, mask, sinks, left, right, scale, softcap, return_lse, key_scale=None, value_scale=None
) -> tuple[Inputs, Problem]:
    """What a call of the operator asks."""
    inputs = Inputs(query, key, value, key_range, mask, sinks, key_scale, value_scale)
    return inputs, problem_of_numbers(inputs, left, right, scale, softcap)


def _run(
    query, key, value, key_range, mask, sinks, left, right, scale, softcap, return_lse, key_scale=None, value_scale=None
):
    """The operator's implementation on every device."""
    inputs, problem = _asked(
        query, key, value, key_range, mask, sinks, left, right, scale, softcap, return_lse, key_scale, value_scale
    )
    return run(problem, inputs, return_lse)


def _fake(
    query, key, value, key_range, mask, sinks, left, right, scale, softcap, return_lse, key_scale=None, value_scale=None
):
    return empty_outputs(query, value, return_lse)


def _decomposed(
    query, key, value, key_range, mask, sinks, left, right, scale, softcap, return_lse, key_scale=None, value_scale=None
):
    """The operator in terms of PyTorch's own, which have every derivative, and which every exporter knows."""
    inputs, problem = _asked(
        query, key, value, key_range, mask, sinks, left, right, scale, softcap, return_lse, key_scale, value_scale
    )
    # Numbers of heads are the model's; symbols would not do for SDPA's `enable_gqa`.
    problem = problem._replace(num_heads=int(problem.num_heads), num_kv_heads=int(problem.num_kv_heads))
    output, lse = torch_attention(problem, inputs, return_lse)
    # Laid out as the kernels do it.
    output = output.transpose(1, 2).contiguous().transpose(1, 2)
    return output, (lse if return_lse else empty_outputs(query, value, False)[1])


TANGENTS = "forward-mode derivatives are asked for, and the kernels have none"
# The place of `return_lse` among the operator's arguments.
_RETURN_LSE = 10


def any_tangent(*tensors: torch.Tensor) -> bool:
    """Whether one of them carries a forward-mode derivative."""
    # Level 0 is the only one that there is; by default a level that was entered in a compiled graph would not be seen.
    return any(forward_ad.unpack_dual(tensor, level=0).tangent is not None for tensor in tensors)


def _with_derivatives(keyset, *arguments):
    """The operator where derivatives may be asked for: through PyTorch if they are, else what it is without them."""
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    tangents = any_tangent(*tensors)
    if tangents:
        reason = TANGENTS
    elif torch._C._functorch.peek_interpreter_stack() is not None and any_requires_grad(*tensors):
        reason = (
            "a function transform (grad, vmap, jacrev) wants gradients, and the kernels' backward has no rule for it"
        )
    elif torch.is_grad_enabled() and any_requires_grad(*tensors):
        inputs, problem = _asked(*arguments)
        reason = backward_fallback_reason(problem, device_of(inputs.query.device))
        if reason is None:
            output, lse = flash_attn_fwd(problem, inputs)
            return output, lse if arguments[_RETURN_LSE] else lse.new_empty(0)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            return _operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
    note_fallback(reason)
    count_path("torch")
    if not tangents and forward_ad._current_level < 0:
        return _decomposed(*arguments)
    # Of SDPA's implementations this one alone has forward-mode derivatives, and gradients that have them (hessians).
    with sdpa_kernel(SDPBackend.MATH):
        return _decomposed(*arguments)


_library.impl("attention", _run, "CompositeExplicitAutograd")
_library.impl("attention", _with_derivatives, "Autograd", with_keyset=True)
torch.library.register_fake("flashcore::attention", _fake, lib=_library)
_operator = torch.ops.flashcore.attention.default
# ONNX's exporter looks here; a torch.export keeps the operator, and so the kernels, unless it is asked to decompose it.
register_decomposition(_operator)(_decomposed)

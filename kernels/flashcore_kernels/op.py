"""The operators: `attention` for callers, and `torch.ops.flashcore.attention`, which torch.compile keeps whole."""

from collections import Counter
from contextlib import nullcontext

import torch
from torch._decomp import register_decomposition
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .choose import choose, fallback_reason
from .device import Device, device_of
from .dispatch import empty_output, empty_outputs, make_launch, serve
from .fallback import note_fallback, torch_attention
from .plan import Plan
from .precompile import prompt_attends
from .problem import (
    Inputs,
    Problem,
    Window,
    any_requires_grad,
    check_problem,
    split_arguments,
    with_alignment,
)
from .runtime.prepared import find, make_call, remember

# How many calls each path served since the process began (or since someone cleared it), by kernel name. In a graph of
# torch.compile the operator counts whenever it runs; of a call with gradients the graph holds PyTorch's own operators,
# and it counts once, when it is compiled.
path_counts: Counter[str] = Counter()


@torch.compiler.assume_constant_result
def count_path(path: str) -> None:
    """Count a call that `path` serves. Never traced: a graph that read the counter would be compiled at every call."""
    path_counts[path] += 1


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
        return_lse: also return the log-sum-exp.

    Returns:
        output `[B, H, Q, Dv]` in query's dtype, laid out so that `output.transpose(1, 2)` is contiguous; with
        return_lse also `[B, H, Q]`: natural logarithm of each row's denominator, float32 (float64 for float64 inputs).
        A query that sees no key gives zeros.

    Raises:
        ValueError: an argument does not fit; the message names it, what it was, and what is accepted.
        NotImplementedError: FLASHCORE_STRICT=1 is set and no kernel can serve the call.
    """
    inputs = Inputs(query, key, value, key_range, mask, sinks, key_scale, value_scale)
    output, lse = attend(inputs, is_causal, window, scale, softcap, return_lse)
    output = output.transpose(1, 2)
    return (output, lse) if return_lse else output


def attend(
    inputs: Inputs,
    is_causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention` for callers that want output as models do, `[B, Q, H, Dv]` (contiguous where a kernel wrote it).

    lse is `[B, H, Q]` with return_lse, and means nothing without.
    """
    signature = None
    if inputs.mask is None and not torch.compiler.is_compiling():
        signature, known = find(inputs, (is_causal, window, scale, softcap, return_lse))
        if known is not None:
            kernel, call = known
            path_counts[kernel] += 1
            return call(inputs)
    problem = check_problem(inputs, is_causal, window, scale, softcap)
    # Nobody listens to the dispatcher, and the kernels take the tensors as they are: straight to a launch.
    if signature is not None and problem.scale > 0.0 and all(t.stride(3) == 1 for t in inputs[:3]):
        problem = with_alignment(problem, inputs)
        plan = choose(problem, device_of(inputs.query.device))
        if plan.kernel != "torch":
            path_counts[plan.kernel] += 1
            return _first_of_its_kind(signature, plan, problem, inputs, return_lse)
    output, lse = torch.ops.flashcore.attention(
        *inputs[:4], inputs.mask, inputs.sinks, problem.left, problem.right, problem.scale, problem.softcap, return_lse,
        inputs.key_scale, inputs.value_scale,
    )  # fmt: skip
    return output.transpose(1, 2), lse


def _first_of_its_kind(
    signature: tuple, plan: Plan, problem: Problem, inputs: Inputs, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Serve a call on the current GPU, and remember how for those like it.

    Its kernel may be there already: a step of a generation is like the one before but for its length.
    """
    launch = make_launch(plan, problem, inputs, empty_output(inputs.query, inputs.value), return_lse)
    call = make_call(launch, problem, inputs, return_lse)
    prompt_attends(problem, inputs.sinks, inputs.query.device, call is not None)
    if call is not None:
        remember(signature, plan.kernel, call)
        return call(inputs)
    output, lse = empty_outputs(inputs.query, inputs.value, return_lse)
    serve(plan, problem, inputs, output, lse if return_lse else None)
    remember(signature, plan.kernel, make_call(launch, problem, inputs, return_lse))
    return output.transpose(1, 2), lse


def explain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, device: Device | None = None, **arguments
) -> str:
    """One line: which kernel `attention` would run for these arguments, with which configuration, and why.

    Args: as `attention`; `device` asks about another device than the tensors', such as `Device("cuda", 90)`.
    """
    inputs, options = split_arguments(query, key, value, **arguments)
    plan = choose(with_alignment(check_problem(inputs, **options), inputs), device or device_of(query.device))
    if plan.kernel == "torch":
        return f"torch: {plan.reason}"
    config = plan.config
    tiles = f"{config.block_m}x{config.block_n}, {config.num_warps} warps, {config.num_stages} stages"
    return f"{plan.kernel} ({tiles}): {plan.reason}"


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
    return inputs, check_problem(inputs, scale=scale, softcap=softcap)._replace(left=left, right=right)


def _run(
    query, key, value, key_range, mask, sinks, left, right, scale, softcap, return_lse, key_scale=None, value_scale=None
):
    """The operator's implementation on every device."""
    inputs, problem = _asked(
        query, key, value, key_range, mask, sinks, left, right, scale, softcap, return_lse, key_scale, value_scale
    )
    device = device_of(query.device)
    inputs = inputs._replace(
        **{name: t if t.stride(3) == 1 else t.contiguous() for name, t in zip(Inputs._fields[:3], inputs)}
    )
    if problem.scale <= 0.0 and fallback_reason(problem, device) is None:
        # The kernels take the largest product for the largest score.
        inputs = inputs._replace(query=inputs.query * (-1.0 if problem.scale < 0.0 else 0.0))
        problem = problem._replace(scale=-problem.scale or 1.0)
    problem = with_alignment(problem, inputs)
    plan = choose(problem, device)
    path_counts[plan.kernel] += 1
    output, lse = empty_outputs(query, value, return_lse)
    if plan.kernel == "torch":
        note_fallback(plan.reason)
        answer, answer_lse = torch_attention(problem, inputs, return_lse)
        output.copy_(answer)
        return output, (answer_lse if return_lse else lse)
    if problem.mask_kind == "bool":
        inputs = inputs._replace(mask=mask.view(torch.uint8))
    if device.kind == "interpreter" and query.dtype == torch.bfloat16:
        # NumPy has no bfloat16, and the interpreter would multiply its bit patterns.
        names = ("query",) if problem.fp8 else ("query", "key", "value")
        inputs = inputs._replace(**{name: getattr(inputs, name).float() for name in names})
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        serve(plan, problem, inputs, output, lse if return_lse else None)
    return output, lse


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


def any_tangent(*tensors: torch.Tensor) -> bool:
    """Whether one of them carries a forward-mode derivative."""
    # Level 0 is the only one that there is; by default a level that was entered in a compiled graph would not be seen.
    return any(forward_ad.unpack_dual(tensor, level=0).tangent is not None for tensor in tensors)


def _with_derivatives(keyset, *arguments):
    """The operator where derivatives may be asked for: through PyTorch if they are, else what it is without them."""
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    tangents = any_tangent(*tensors)
    if tangents:
        reason = "forward-mode derivatives are asked for, and the kernels have none"
    elif torch.is_grad_enabled() and any_requires_grad(*tensors):
        reason = "gradients are asked for, and the kernels have no backward yet"
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

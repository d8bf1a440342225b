"""The operators: `attention` for callers, and `torch.ops.flashcore.attention`, which torch.compile keeps whole."""

import functools
from collections import Counter
from collections.abc import Callable

import torch
from torch._decomp import register_decomposition
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .ahead import prompt_attends
from .fallback import note_fallback, torch_attention
from .plan import Device, Plan, fallback_reason, plan
from .prepared import find, prepare, remember
from .problem import Problem, Window, any_requires_grad, check_problem, with_alignment

# How many calls each path served since the process began (or since someone cleared it), by kernel name. In a graph of
# torch.compile the operator counts whenever it runs; of a call with gradients the graph holds PyTorch's own operators,
# and it counts once, when it is compiled.
path_counts: Counter[str] = Counter()


@torch.compiler.assume_constant_result
def count(path: str) -> None:
    """Count a call that `path` serves. Never traced: a graph that read the counter would be compiled at every call."""
    path_counts[path] += 1


@functools.cache
def device_of(device: torch.device) -> Device:
    """What `plan` needs to know of `device`."""
    try:
        import triton
        from triton.runtime.interpreter import InterpretedFunction

        from .forward import flashcore_forward
    except ImportError as error:
        return Device("torch", reason=f"Triton cannot be imported ({error})")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if isinstance(flashcore_forward, InterpretedFunction):
        import numpy

        if version < (3, 7) and tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4):
            # It takes arrays of one element for ints.
            found = f"Triton {triton.__version__} and NumPy {numpy.__version__}"
            return Device("torch", reason=f"Triton's interpreter before 3.7 needs NumPy before 2.4; here are {found}")
        return Device("interpreter")
    if device.type != "cuda" or torch.version.hip:
        return Device("torch", reason=f"the kernels run on NVIDIA GPUs, and the tensors are on '{device.type}'")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return Device("torch", reason=f"the kernels need compute capability 8.0 or newer, this GPU has {major}.{minor}")
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Device("cuda", major * 10 + minor, triton=version, processors=processors)


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
    output, lse = attend(
        query, key, value, key_range, mask, is_causal, window, scale, softcap, sinks, key_scale, value_scale, return_lse
    )
    output = output.transpose(1, 2)
    return (output, lse) if return_lse else output


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention` for callers that want output as models do, `[B, Q, H, Dv]` (contiguous where a kernel wrote it).

    lse is `[B, H, Q]` with return_lse, and means nothing without.
    """
    signature = None
    if mask is None and not torch.compiler.is_compiling():
        tensors = (query, key, value, key_range, sinks, key_scale, value_scale)
        signature, call = find(*tensors, is_causal, window, scale, softcap, return_lse)
        if call is not None:
            kernel, run = call
            path_counts[kernel] += 1
            return run(*tensors)
    problem = check_problem(
        query, key, value, key_range, mask, is_causal, window, scale, softcap, sinks, key_scale, value_scale
    )
    chosen = None
    if signature is not None and problem.scale > 0.0 and all(t.stride(3) == 1 for t in (query, key, value)):
        chosen = plan(with_alignment(problem, query, key, value), device_of(query.device))
        # A step of a generation is like the one before but for its length: the kernel is there, and only a launch left.
        call = _prepared(signature, problem, chosen, tensors, return_lse)
        if chosen.kernel != "torch":
            prompt_attends(problem, sinks, query.device, call is not None)
        if call is not None:
            path_counts[chosen.kernel] += 1
            return call(*tensors)
    output, lse = torch.ops.flashcore.attention(
        query, key, value, key_range, mask, sinks, problem.left, problem.right, problem.scale, problem.softcap,
        return_lse, key_scale, value_scale,
    )  # fmt: skip
    if chosen is not None:
        _prepared(signature, problem, chosen, tensors, return_lse)
    return output.transpose(1, 2), lse


def _prepared(
    signature: tuple, problem: Problem, chosen: Plan, tensors: tuple, return_lse: bool
) -> Callable[..., tuple] | None:
    """The function that serves calls of this signature from now on, or None while its kernel is not compiled."""
    if chosen.kernel == "torch":
        return None
    if chosen.kernel == "flashcore_forward":
        call = functools.partial(_serve, chosen, problem, return_lse)
    else:
        call = prepare(problem, chosen, tensors, return_lse)
    if call is not None:
        remember(signature, chosen.kernel, call)
    return call


def explain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, device: Device | None = None, **arguments
) -> str:
    """One line: which kernel `attention` would run for these arguments, with which configuration, and why.

    Args: as `attention`; `device` asks about another device than the tensors', such as `Device("cuda", 90)`.
    """
    problem = with_alignment(check_problem(query, key, value, **arguments), query, key, value)
    chosen = plan(problem, device or device_of(query.device))
    if chosen.kernel == "torch":
        return f"torch: {chosen.reason}"
    tiles = f"{chosen.block_m}x{chosen.block_n}, {chosen.num_warps} warps, {chosen.num_stages} stages"
    return f"{chosen.kernel} ({tiles}): {chosen.reason}"


_library = torch.library.Library("flashcore", "DEF")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? key_range, Tensor? mask, Tensor? sinks, "
    "int left, int right, float scale, float softcap, bool return_lse, Tensor? key_scale=None, "
    "Tensor? value_scale=None) -> (Tensor, Tensor)"
)


def _empty_outputs(query: torch.Tensor, value: torch.Tensor, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, H, Q, Dv]` with the heads inside the sequence in memory, and lse `[B, H, Q]` (or `[0]`)."""
    batch_size, num_heads, num_queries, _ = query.shape
    output = query.new_empty(batch_size, num_queries, num_heads, value.shape[3]).transpose(1, 2)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return output, query.new_empty((batch_size, num_heads, num_queries) if return_lse else (0,), dtype=dtype)


def _problem(
    query, key, value, key_range, mask, sinks, left, right, scale, softcap, return_lse, key_scale=None, value_scale=None
) -> Problem:
    """What a call of the operator asks."""
    problem = check_problem(
        query, key, value, key_range, mask, False, None, scale, softcap, sinks, key_scale, value_scale
    )
    return problem._replace(left=left, right=right)


def _run(
    query, key, value, key_range, mask, sinks, left, right, scale, softcap, return_lse, key_scale=None, value_scale=None
):
    """The operator's implementation on every device."""
    problem = _problem(
        query, key, value, key_range, mask, sinks, left, right, scale, softcap, return_lse, key_scale, value_scale
    )
    device = device_of(query.device)
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    if problem.scale <= 0.0 and fallback_reason(problem, device) is None:
        # The kernels take the largest product for the largest score.
        query = query * (-1.0 if problem.scale < 0.0 else 0.0)
        problem = problem._replace(scale=-problem.scale or 1.0)
    chosen = plan(with_alignment(problem, query, key, value), device)
    path_counts[chosen.kernel] += 1
    output, lse = _empty_outputs(query, value, return_lse)
    if chosen.kernel == "torch":
        note_fallback(chosen.reason)
        answer, answer_lse = torch_attention(
            problem, query, key, value, key_range, mask, sinks, return_lse, 0.0, key_scale, value_scale
        )
        output.copy_(answer)
        return output, (answer_lse if return_lse else lse)
    if device.kind == "interpreter" and query.dtype == torch.bfloat16:
        # NumPy has no bfloat16, and the interpreter would multiply its bit patterns.
        query = query.float()
        if not problem.fp8:
            key, value = key.float(), value.float()
    scales = (key_scale, value_scale) if problem.fp8 else ()
    tensors = (query, key, value, key_range, mask, sinks, output, lse if return_lse else None, *scales)
    if query.is_cuda and query.device.index != torch.cuda.current_device():
        with torch.cuda.device(query.device):
            _launch(chosen, problem, *tensors)
    else:
        _launch(chosen, problem, *tensors)
    return output, lse


def _serve(chosen: Plan, problem: Problem, return_lse: bool, query, key, value, key_range, sinks, *scales):
    """A call like one that was checked and planned before: allocate and launch, without torch's dispatcher."""
    output, lse = _empty_outputs(query, value, return_lse)
    scales = scales if problem.fp8 else ()
    _launch(chosen, problem, query, key, value, key_range, None, sinks, output, lse if return_lse else None, *scales)
    return output.transpose(1, 2), lse


def _launch(chosen: Plan, problem: Problem, *tensors: torch.Tensor | None) -> None:
    if chosen.kernel == "flashcore_decode":
        from .decode import run_decode

        run_decode(problem, chosen, *tensors)
    elif chosen.kernel == "flashcore_hopper_decode":
        from .hopper.decode_run import run_hopper_decode

        run_hopper_decode(problem, chosen, *tensors)
    elif chosen.kernel == "flashcore_hopper":
        from .hopper.run import run_hopper

        run_hopper(problem, chosen, *tensors)
    else:
        from .forward import run_forward

        run_forward(problem, chosen, *tensors)


def _fake(
    query, key, value, key_range, mask, sinks, left, right, scale, softcap, return_lse, key_scale=None, value_scale=None
):
    return _empty_outputs(query, value, return_lse)


def _decomposed(
    query, key, value, key_range, mask, sinks, left, right, scale, softcap, return_lse, key_scale=None, value_scale=None
):
    """The operator in terms of PyTorch's own, which have every derivative, and which every exporter knows."""
    tensors = (query, key, value, key_range, mask, sinks)
    problem = _problem(*tensors, left, right, scale, softcap, return_lse, key_scale, value_scale)
    # Numbers of heads are the model's; symbols would not do for SDPA's `enable_gqa`.
    problem = problem._replace(num_heads=int(problem.num_heads), num_kv_heads=int(problem.num_kv_heads))
    output, lse = torch_attention(problem, *tensors, return_lse, 0.0, key_scale, value_scale)
    # Laid out as the kernels do it.
    output = output.transpose(1, 2).contiguous().transpose(1, 2)
    return output, (lse if return_lse else _empty_outputs(query, value, False)[1])


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
    count("torch")
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

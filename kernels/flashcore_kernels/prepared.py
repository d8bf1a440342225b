"""Calls like one that was made before: what was checked and chosen then holds, and only a launch is left.

Checking, planning and torch's dispatcher cost several times what a decode layer's kernel does, and a model asks the
same of every layer. So a call's signature (shapes, strides, dtypes, devices, alignments, options: all that checks and
plans look at) leads to a function that allocates and launches.
"""

import functools
from collections.abc import Callable

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from .counters import forget, workspace, zero
from .launch import compiled_kernel, launcher
from .plan import Plan
from .problem import Problem, any_requires_grad

# Lengths grow, so signatures come and go; a few thousand are some megabytes.
MOST = 4096
_prepared: dict[tuple, tuple[str, Callable]] = {}
_is_grad_enabled = torch.is_grad_enabled


def goes_past_dispatcher(tensor: torch.Tensor) -> bool:
    """Whether a kernel may be launched on this tensor without asking torch's dispatcher.

    It is a plain one on the current GPU, and nobody listens: no mode, no function transform, no tracer, no forward-mode
    derivative.
    """
    return (
        tensor.is_cuda
        and type(tensor) is Tensor
        and not _C._len_torch_dispatch_stack()
        and _C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and _C._get_tracing_state() is None
        and tensor.get_device() == _C._cuda_getDevice()
    )


def find(
    query, key, value, key_range, sinks, key_scale, value_scale, *options
) -> tuple[tuple | None, tuple[str, Callable] | None]:
    """(the call's signature, the kernel's name and the function for it if one like it was made before).

    The signature is what decides how a call is served; None where it has to go through torch's dispatcher or needs
    gradients.
    """
    try:
        if not goes_past_dispatcher(query) or (
            _is_grad_enabled() and any_requires_grad(query, key, value, sinks, key_scale, value_scale)
        ):
            return None, None
        signature = (
            query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride(),
            query.dtype, key.dtype, value.dtype, query.device, key.device, value.device,
            (query.data_ptr() | key.data_ptr() | value.data_ptr()) % 16,
            None if key_range is None else _looks(key_range), None if sinks is None else _looks(sinks),
            None if key_scale is None else _looks(key_scale), None if value_scale is None else _looks(value_scale),
            options,
        )  # fmt: skip
        return signature, _prepared.get(signature)
    except (AttributeError, TypeError, RuntimeError):  # an argument of a wrong type, which the checks will name
        return None, None


def _looks(tensor: torch.Tensor) -> tuple:
    """What a signature says of a tensor whose elements are read one by one."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16


def remember(signature: tuple, kernel: str, call: Callable) -> None:
    """Let `call` serve the calls of this signature from now on.

    Args:
        kernel: its name, for `path_counts`.
        call: from query, key, value, key_range, sinks, key_scale, value_scale to output `[B, Q, H, Dv]` and lse.
    """
    if len(_prepared) >= MOST:
        _prepared.clear()
    _prepared[signature] = kernel, call


def prepare(problem: Problem, plan: Plan, tensors: tuple, return_lse: bool) -> Callable | None:
    """The function that serves calls like this one by a launch alone, or None where their kernel is not compiled yet.

    Args:
        plan: of a decode kernel or of `flashcore_hopper`.
        tensors: a call's query, key, value, key_range, sinks, key_scale, value_scale.
    """
    make = _prefill_call if plan.kernel == "flashcore_hopper" else _decode_call
    return make(problem, plan, *tensors, return_lse)


def _decode_call(problem, plan, query, key, value, key_range, sinks, *scales_and_lse) -> Callable | None:
    *scales, return_lse = scales_and_lse
    dtype, device, index = query.dtype, query.device, query.device.index
    batch_size, num_queries, num_heads = problem.batch_size, problem.num_queries, problem.num_heads
    shape = (batch_size, num_queries, num_heads, problem.value_dim)
    out = _allocated(dtype)
    if plan.kernel == "flashcore_hopper_decode":
        from .hopper.decode_run import hopper_decode_launch  # needs Triton

        setup = hopper_decode_launch(problem, plan, query, key, value, key_range, return_lse)
        mask, has_scales = (), True
    else:
        from .decode import decode_launch

        strided = torch.empty(shape, device="meta").transpose(1, 2)
        setup = decode_launch(problem, plan, query, key, value, strided, key_range, (0, 0, 0, 0), return_lse)
        mask, has_scales = (None,), False
    float32, length, units = torch.float32, setup.partial, setup.units
    lse = _allocated(float32) if return_lse else None
    if not units:
        room = (_allocated(torch.int32) if length else None,)
    else:
        room = (_allocated(float32), _allocated(torch.int32)) if length else (None, None)
    scales = scales if has_scales else ()
    pointers = (query, key, value, out, lse, key_range, *mask, sinks, *scales, *room)
    compiled = compiled_kernel(setup.kernel, pointers + setup.integers, setup.constants, plan)
    if compiled is None:
        return None
    (run, prefix), programs = launcher(compiled), setup.programs
    rest = (*setup.integers, *setup.scalars, *setup.constants)
    lse_shape = (batch_size, num_heads, num_queries)
    raw_stream, empty = torch._C._cuda_getCurrentRawStream, torch.empty

    def call(query, key, value, key_range, sinks, *scales):
        output = empty(shape, dtype=dtype, device=device)
        lse = empty(lse_shape, dtype=float32, device=device) if return_lse else None
        room = workspace(units, length, device)
        try:
            # Addresses, where the launcher would ask the driver about each tensor.
            run(
                *programs, 1, raw_stream(index), *prefix,
                query.data_ptr(), key.data_ptr(), value.data_ptr(), output.data_ptr(),
                None if lse is None else lse.data_ptr(), None if key_range is None else key_range.data_ptr(), *mask,
                None if sinks is None else sinks.data_ptr(),
                *([None if scale is None else scale.data_ptr() for scale in scales] if has_scales else ()),
                *[None if part is None else part.data_ptr() for part in room], *rest,
            )  # fmt: skip
        except BaseException:
            forget(device)
            raise
        return output, lse

    return call


@functools.cache
def _allocated(dtype: torch.dtype) -> torch.Tensor:
    """Stands for a tensor that a call will allocate where its compiled kernel is looked up: of that dtype, aligned."""
    return torch.empty(16, dtype=dtype)


def _prefill_call(problem, plan, query, key, value, key_range, sinks, *scales_and_lse) -> Callable | None:
    from .hopper.run import flashcore_hopper, hopper_launch, on, without_base

    return_lse = scales_and_lse[-1]
    shape = (problem.batch_size, problem.num_queries, problem.num_heads, problem.value_dim)
    lse_shape = (problem.batch_size, problem.num_heads, problem.num_queries)
    out = query.new_empty(shape).transpose(1, 2)
    lse = query.new_empty(1, dtype=torch.float32) if return_lse else None
    setup = hopper_launch(problem, plan, query, key, value, key_range, out, return_lse)
    writes_itself = setup.writes_itself
    pointers = (
        *setup.descriptors, lse, key_range, sinks, out if writes_itself else None, _allocated(torch.int32),
    )  # fmt: skip
    compiled = compiled_kernel(flashcore_hopper, pointers, setup.constants, plan)
    if compiled is None:
        return None
    (run, prefix), programs = launcher(compiled), setup.programs
    rest = (*setup.scalars, *setup.constants)
    dtype, device, index = query.dtype, query.device, query.device.index
    q0, q1, k0, k1, v0, v1, o0, o1 = map(without_base, setup.descriptors)
    raw_stream, empty, float32 = torch._C._cuda_getCurrentRawStream, torch.empty, torch.float32

    def call(query, key, value, key_range, sinks, *scales):
        output = empty(shape, dtype=dtype, device=device)
        lse = empty(lse_shape, dtype=float32, device=device) if return_lse else None
        counter = zero(device)
        try:
            run(
                programs, 1, 1, raw_stream(index), *prefix,
                on(q0, query), on(q1, query), on(k0, key), on(k1, key), on(v0, value), on(v1, value), on(o0, output),
                on(o1, output), None if lse is None else lse.data_ptr(),
                None if key_range is None else key_range.data_ptr(), None if sinks is None else sinks.data_ptr(),
                output.data_ptr() if writes_itself else None, counter.data_ptr(), *rest,
            )  # fmt: skip
        except BaseException:
            forget(device)
            raise
        return output, lse

    return call

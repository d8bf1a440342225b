"""Calls like one that was made before: what was checked and chosen then holds, and only a launch is left.

Checking, choosing and torch's dispatcher cost several times what a decode layer's kernel does, and a model asks the
same of every layer. So a call's signature (shapes, strides, dtypes, devices, alignments, options: all that checks and
choices look at) leads to a function that allocates and launches.
"""

import functools
from collections.abc import Callable

import torch

from ..device import goes_past_dispatcher, nobody_listens
from ..problem import Inputs, Problem, any_requires_grad
from .launch import Launch, compiled_kernel
from .repeated import repeated
from .workspace import forget, workspace

# Lengths grow, so signatures come and go; a few thousand are some megabytes.
MOST = 4096
_calls: dict[tuple, tuple[str, Callable]] = {}
_is_grad_enabled = torch.is_grad_enabled


def find(inputs: Inputs, options: tuple) -> tuple[tuple | None, tuple[str, Callable] | None]:
    """(the call's signature, the kernel's name and the function for it if one like it was made before).

    The signature is what decides how a call is served; None where it has to go through torch's dispatcher or needs
    gradients. There is no dropout.
    """
    try:
        if inputs.mask is not None and not nobody_listens(inputs.mask):
            return None, None
        if not goes_past_dispatcher(inputs.query) or (_is_grad_enabled() and any_requires_grad(*inputs)):
            return None, None
        signature = signature_of(inputs, options)
        return signature, _calls.get(signature)
    except (AttributeError, TypeError, RuntimeError):  # an argument of a wrong type, which the checks will name
        return None, None


def find_by(signature: tuple) -> tuple[str, Callable] | None:
    """The kernel's name and the function for calls of this signature, if one like it was made before."""
    return _calls.get(signature)


def signature_of(inputs: Inputs, options: tuple) -> tuple:
    """All that checks and choices look at."""
    query, key, value, key_range, mask, sinks, key_scale, value_scale, _ = inputs
    return (
        query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride(),
        query.dtype, key.dtype, value.dtype, query.device, key.device, value.device,
        query.data_ptr() % 16, key.data_ptr() % 16, value.data_ptr() % 16,
        None if key_range is None else _looks(key_range), None if sinks is None else _looks(sinks),
        None if key_scale is None else _looks(key_scale), None if value_scale is None else _looks(value_scale),
        # How a mask is read depends on what of its storage lies behind it.
        None if mask is None else (*_looks(mask), mask.storage_offset(), mask.untyped_storage().nbytes()), options,
    )  # fmt: skip


def _looks(tensor: torch.Tensor) -> tuple:
    """What a signature says of a tensor whose elements are read one by one."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16


def remember(signature: tuple, kernel: str, call: Callable) -> None:
    """Let `call` serve the calls of this signature from now on.

    Args:
        kernel: its name, for `path_counts`.
        call: from Inputs to output `[B, Q, H, Dv]` and lse.
    """
    if len(_calls) >= MOST:
        _calls.clear()
    _calls[signature] = kernel, call


def make_call(
    launch: Launch, problem: Problem, inputs: Inputs, return_lse: bool, fit: Callable[[Inputs], Inputs] | None = None
) -> Callable | None:
    """The function that serves calls like this one by launches alone, or None while their kernels are not compiled.

    Args:
        fit: what makes of a call's Inputs those that the launch takes, where that is a copy.
    """
    dtype, device, index = inputs.query.dtype, inputs.query.device, inputs.query.device.index
    shape = (problem.batch_size, problem.num_queries, problem.num_heads, problem.value_dim)
    lse_shape = (problem.batch_size, problem.num_heads, problem.num_queries)
    partials, counters, map_words = launch.partials, launch.counters, [words for words in launch.map_words if words]
    int32, float32 = torch.int32, torch.float32
    standing_in = (
        *inputs, _allocated(dtype), _allocated(float32) if return_lse else None,
        _allocated(float32 if counters else int32) if partials else None, _allocated(int32) if counters else None, None,
        *(_allocated(int32) for _ in map_words),
    )  # fmt: skip
    launches = []
    for each in (launch.before, launch):
        if each is not None:
            compiled = compiled_kernel(each, standing_in)
            if compiled is None:
                return None
            rest = (*each.integers, *each.scalars, *each.constants)
            launches.append(repeated(compiled, (*each.grid, 1), each.repeated_operands, rest))
    raw_stream, empty = torch._C._cuda_getCurrentRawStream, torch.empty

    def call(inputs):
        if fit is not None:
            inputs = fit(inputs)
        output = empty(shape, dtype=dtype, device=device)
        lse = empty(lse_shape, dtype=float32, device=device) if return_lse else None
        maps = [empty(words, dtype=int32, device=device) for words in map_words]
        tensors = (*inputs, output, lse, *workspace(partials, counters, device), None, *maps)
        try:
            stream = raw_stream(index)
            for each in launches:
                each(tensors, stream)
        except BaseException:
            forget(device)
            raise
        return output, lse

    return call


@functools.cache
def _allocated(dtype: torch.dtype) -> torch.Tensor:
    """Stands for a tensor that a call will allocate where its compiled kernel is looked up: of that dtype, aligned."""
    return torch.empty(16, dtype=dtype)

"""Calls like one that was made before: what was checked and chosen then holds, and only a launch is left.

Checking, choosing and torch's dispatcher cost several times what a decode layer's kernel does, and a model asks the
same of every layer. So a call's signature (shapes, strides, dtypes, devices, alignments, options: all that checks and
choices look at) leads to a function that allocates and launches.
"""

import functools
from collections.abc import Callable

import torch

from ..device import goes_past_dispatcher
from ..problem import Inputs, Problem, any_requires_grad
from .launch import Launch, compiled_kernel, launcher
from .workspace import forget, workspace

# Lengths grow, so signatures come and go; a few thousand are some megabytes.
MOST = 4096
_calls: dict[tuple, tuple[str, Callable]] = {}
_is_grad_enabled = torch.is_grad_enabled


def find(inputs: Inputs, options: tuple) -> tuple[tuple | None, tuple[str, Callable] | None]:
    """(the call's signature, the kernel's name and the function for it if one like it was made before).

    The signature is what decides how a call is served; None where it has to go through torch's dispatcher or needs
    gradients. There is no mask and no dropout.
    """
    query, key, value, key_range, _, sinks, key_scale, value_scale, _ = inputs
    try:
        if not goes_past_dispatcher(query) or (_is_grad_enabled() and any_requires_grad(*inputs)):
            return None, None
        signature = (
            query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride(),
            query.dtype, key.dtype, value.dtype, query.device, key.device, value.device,
            (query.data_ptr() | key.data_ptr() | value.data_ptr()) % 16,
            None if key_range is None else _looks(key_range), None if sinks is None else _looks(sinks),
            None if key_scale is None else _looks(key_scale), None if value_scale is None else _looks(value_scale),
            options,
        )  # fmt: skip
        return signature, _calls.get(signature)
    except (AttributeError, TypeError, RuntimeError):  # an argument of a wrong type, which the checks will name
        return None, None


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


def make_call(launch: Launch, problem: Problem, inputs: Inputs, return_lse: bool) -> Callable | None:
    """The function that serves calls like this one by a launch alone, or None while their kernel is not compiled."""
    dtype, device, index = inputs.query.dtype, inputs.query.device, inputs.query.device.index
    shape = (problem.batch_size, problem.num_queries, problem.num_heads, problem.value_dim)
    lse_shape = (problem.batch_size, problem.num_heads, problem.num_queries)
    partials, counters = launch.partials, launch.counters
    float32 = torch.float32
    compiled = compiled_kernel(
        launch,
        (
            *inputs, _allocated(dtype), _allocated(float32) if return_lse else None,
            _allocated(float32 if counters else torch.int32) if partials else None,
            _allocated(torch.int32) if counters else None, None,
        ),
    )  # fmt: skip
    if compiled is None:
        return None
    start, prefix = launcher(compiled)
    x, y = launch.grid
    pick, tiles = launch.pick, launch.tiles if any(launch.tiles) else None
    rest = (*launch.integers, *launch.scalars, *launch.constants)
    raw_stream, empty = torch._C._cuda_getCurrentRawStream, torch.empty

    # Addresses, where the launcher would ask the driver about each tensor.
    def call(inputs):
        output = empty(shape, dtype=dtype, device=device)
        lse = empty(lse_shape, dtype=float32, device=device) if return_lse else None
        operands = pick((*inputs, output, lse, *workspace(partials, counters, device), None))
        try:
            if tiles is None:
                addresses = [tensor if tensor is None else tensor.data_ptr() for tensor in operands]
            else:
                addresses = [
                    tensor if tensor is None else tensor.data_ptr() if tile is None else tile.on(tensor)
                    for tile, tensor in zip(tiles, operands)
                ]
            start(x, y, 1, raw_stream(index), *prefix, *addresses, *rest)
        except BaseException:
            forget(device)
            raise
        return output, lse

    return call


@functools.cache
def _allocated(dtype: torch.dtype) -> torch.Tensor:
    """Stands for a tensor that a call will allocate where its compiled kernel is looked up: of that dtype, aligned."""
    return torch.empty(16, dtype=dtype)

"""Kernels of a generation's steps, compiled in the background while a prompt waits for its own.

A process compiles each kernel at its first call, unless Triton finds it on disk: seconds for a prompt's, then one or
two more before the second token for those of a step. Most of that runs outside of Python's lock.
"""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from .key_range import HEADER_WORDS, sequence_width
from .plan import Device, plan
from .problem import Problem

# CPython 3.11 up to 3.11.7 fails where two threads parse at once (its issue 106905); Triton before 3.5 hashes without a
# lock.
THREADS_MAY_PARSE = sys.version_info >= (3, 11, 8)
TRITON = (3, 5)
# Seconds after which the step's decode kernel begins: by then the prompt's own needs Python no longer.
HEAD_START = 1.0
# Any number of slots beyond which a sequence has several chunks: kernels do not depend on it.
SLOTS = 4096

_steps_follow: ContextVar[dict | None] = ContextVar("flashcore_steps_follow", default=None)


def begin(device: torch.device) -> None:
    """A generation is going to come: import what it needs, and start Triton by one small kernel in the background.

    Triton's start (its driver is C that it compiles, its hash is of all of itself) takes most of a second.
    """
    if not _can_compile(device):
        return
    # Here, for two threads that import the same modules at once may find them half made.
    from . import decode, forward, kv_write_kernel  # noqa: F401
    from .key_range_kernel import run_key_range

    if _device_of(device).arch == 90:
        from .hopper import decode_run, run  # noqa: F401

    def compile_key_range():
        words = torch.empty(1, sequence_width(SLOTS), dtype=torch.int32, device="meta")
        mask, slot = words.new_empty(1, SLOTS, dtype=torch.bool), words.new_empty(1, dtype=torch.int64)
        run_key_range(words, mask, slot, -1, 0, HEADER_WORDS)

    _in_background(device, compile_key_range)


@contextmanager
def steps_follow(*, fp8: bool = False):
    """Say that the calls within are those of a prompt, and one-token steps on a preallocated cache come next.

    Args:
        fp8: the cache holds float8_e4m3fn.
    """
    token = _steps_follow.set({"fp8": fp8})
    try:
        yield
    finally:
        _steps_follow.reset(token)


def prompt_compiles(problem: Problem, sinks: torch.Tensor | None, device: torch.device) -> None:
    """A call on `device` whose kernel is about to be compiled: begin with those of the steps that follow, if any do."""
    expected = _steps_follow.get()
    # Without a KeyRange nor will the steps have one.
    if expected is None or problem.range_layout != "sequence" or not _can_compile(device):
        return
    _steps_follow.set(None)  # once a prompt: its layers are alike
    _in_background(device, compile_steps, problem, sinks, _device_of(device), **expected)


def _device_of(device: torch.device) -> Device:
    from .op import device_of  # it needs this file

    return device_of(device)


def _can_compile(device: torch.device) -> bool:
    kind = _device_of(device)
    return THREADS_MAY_PARSE and kind.kind == "cuda" and kind.triton >= TRITON


def _in_background(device: torch.device, call: Callable, *args, **kwargs) -> None:
    def run():
        try:
            with torch.cuda.device(device):
                call(*args, **kwargs)
        except Exception:  # noqa: BLE001 - whoever needs the kernel compiles it himself, and gets the error
            pass

    # Not a daemon: the interpreter must not end amid a compilation.
    threading.Thread(target=run).start()


def compile_steps(problem: Problem, sinks: torch.Tensor | None, kind: Device, fp8: bool) -> None:
    """Compile for the current device what one token of every sequence needs in each layer, in a cache's layout."""
    from .kv_write_kernel import run_write  # needs Triton
    from .op import _launch

    batch, heads, kv_heads = problem.batch_size, problem.num_heads, problem.num_kv_heads

    def new(*shape, dtype=problem.dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def token(num_heads, size):  # as layers make it: [B, heads, 1, size], the heads inside of the sequence
        return new(batch, 1, num_heads, size).transpose(1, 2)

    stored = torch.float8_e4m3fn if fp8 else problem.dtype
    key_buffer = new(batch, kv_heads, SLOTS, problem.head_dim, dtype=stored)
    value_buffer = new(batch, kv_heads, SLOTS, problem.value_dim, dtype=stored)
    scales = [new(batch, kv_heads, dtype=torch.float32) for _ in "kv"] if fp8 else [None, None]
    slot = new(1, dtype=torch.int64)
    key_range = new(batch, 1, 1, sequence_width(SLOTS), dtype=torch.int32)
    new_key, new_value = token(kv_heads, problem.head_dim), token(kv_heads, problem.value_dim)
    run_write(key_buffer, value_buffer, new_key, new_value, slot, 0, *scales)
    time.sleep(HEAD_START)
    problem = problem._replace(
        num_queries=1, num_keys=SLOTS, query_start=SLOTS - 1, left=-1, right=-1, range_layout="sequence", fp8=fp8,
        aligned=True,
    )  # fmt: skip
    out = token(heads, problem.value_dim)
    tensors = (token(heads, problem.head_dim), key_buffer, value_buffer, key_range, None, sinks, out, None)
    _launch(plan(problem, kind), problem, *tensors, *(scales if fp8 else ()))

"""A generation's kernels, compiled in the background: a prompt's from its announcement on, its steps' beside that.

A server's too (`Ahead`): what it is going to launch is told by calls on meta tensors.

A process compiles each kernel at its first call, unless Triton finds it on disk: seconds for a prompt's, then one or
two more before the second token for those of a step. Most of that runs outside of Python's lock.
"""

import sys
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import NamedTuple

import torch

from .choose import choose
from .device import Device, device_of
from .dispatch import serve
from .key_range import HEADER_WORDS, as_key_range, sequence_width
from .problem import Inputs, Problem, check_problem
from .runtime.launch import is_compiled, planned_launches

# CPython 3.11 up to 3.11.7 fails where two threads parse at once (its issue 106905); Triton before 3.5 hashes without a
# lock.
THREADS_MAY_PARSE = sys.version_info >= (3, 11, 8)
TRITON = (3, 5)
# Seconds after which the steps' kernels begin: by then the prompt's own needs Python no longer.
HEAD_START = 1.5
# Kernels of an `Ahead` that are compiled at once. Python parses one at a time, a third of what each takes.
THREADS = 8
# Any number of slots beyond which a sequence has several chunks: kernels do not depend on it.
SLOTS = 4096

# What `compile_step` was begun with.
_begun: set[tuple] = set()
# Whether the steps' cache holds fp8; None: no steps follow.
_steps_follow: ContextVar[bool | None] = ContextVar("flashcore_steps_follow", default=None)


class Prompt(NamedTuple):
    """What the kernel for a prompt under a KeyRange depends on, in the layers of one model.

    Attributes:
        head_dim, value_dim: of a row of K and of V.
        dtype: of query, key and value.
        softcap: whether scores have one.
        sinks: dtype of the sinks' logits, None where there are none.
    """

    head_dim: int
    value_dim: int
    dtype: torch.dtype
    softcap: bool
    sinks: torch.dtype | None


def begin_compiling(device: torch.device, prompt: Prompt | None = None) -> None:
    """A generation is going to come: import what it needs, and compile in the background what can be told already.

    On Hopper that is the kernel of its prompt, whatever its length, batch and number of heads. Elsewhere, and where
    `prompt` is None, it is one small kernel, by which Triton starts (its driver is C that it compiles, its hash is of
    all of itself): most of a second.
    """
    if not _can_compile(device):
        return
    # Here, for two threads that import the same modules at once may find them half made.
    from .portable import decode, forward, key_range_kernel, kv_write_kernel  # noqa: F401

    kind = device_of(device)
    if kind.arch == 90:
        from .hopper.decode import launch as decode_launch  # noqa: F401
        from .hopper.prefill import launch as prefill_launch  # noqa: F401

    _in_background(device, compile_first, prompt, kind)


def compile_first(prompt: Prompt | None, kind: Device) -> None:
    """Compile for the current device the kernel for a prompt, or that of KeyRanges where more must be known for it."""
    if prompt is not None:
        query = torch.empty(1, 1, SLOTS, prompt.head_dim, dtype=prompt.dtype, device="meta")
        key = torch.empty_like(query)
        value = key.new_empty(1, 1, SLOTS, prompt.value_dim)
        key_range = as_key_range(key.new_empty(1, sequence_width(SLOTS), dtype=torch.int32), SLOTS)
        sinks = None if prompt.sinks is None else key.new_empty(1, dtype=prompt.sinks)
        softcap = 1.0 if prompt.softcap else None
        inputs = Inputs(query, key, value, key_range, sinks=sinks)
        problem = check_problem(inputs, softcap=softcap)._replace(aligned=True)
        plan = choose(problem, kind)
        if plan.kernel == "flashcore_hopper":
            out = value.new_empty(1, SLOTS, 1, prompt.value_dim).transpose(1, 2)
            serve(plan, problem, inputs, out, None)
            return
    compile_key_range()


def compile_key_range() -> None:
    """Compile for the current device the kernel that makes a step's KeyRange."""
    from .portable.key_range_kernel import run_key_range

    words = torch.empty(1, sequence_width(SLOTS), dtype=torch.int32, device="meta")
    mask, slot = words.new_empty(1, SLOTS, dtype=torch.bool), words.new_empty(1, dtype=torch.int64)
    run_key_range(words, mask, slot, -1, 0, HEADER_WORDS)


@contextmanager
def steps_follow(*, fp8: bool = False):
    """Say that the calls within are those of a prompt, and one-token steps on a preallocated cache come next.

    Args:
        fp8: the cache holds float8_e4m3fn.
    """
    token = _steps_follow.set(fp8)
    try:
        yield
    finally:
        _steps_follow.reset(token)


def prompt_attends(problem: Problem, sinks: torch.Tensor | None, device: torch.device, compiled: bool) -> None:
    """A call on `device` of a kind that is new: begin with the kernels of the steps that follow, if any do.

    Args:
        compiled: its own kernel is there already; else it is about to be compiled.
    """
    fp8 = _steps_follow.get()
    # Without a KeyRange nor will the steps have one.
    if fp8 is None or problem.range_layout != "sequence" or not _can_compile(device):
        return
    _steps_follow.set(None)  # once a prompt: its layers are alike
    step = step_after(problem, fp8)
    kind = device, step, None if sinks is None else sinks.dtype
    if kind not in _begun:
        _begun.add(kind)
        _in_background(device, compile_step, step, sinks, device_of(device), 0.0 if compiled else HEAD_START)


def step_after(prompt: Problem, fp8: bool) -> Problem:
    """One token of every sequence of a prompt, on a cache of any length."""
    return prompt._replace(
        num_queries=1, num_keys=SLOTS, query_start=SLOTS - 1, left=-1, right=-1, aligned=True, fp8=fp8
    )


def _can_compile(device: torch.device) -> bool:
    kind = device_of(device)
    return THREADS_MAY_PARSE and kind.kind == "cuda" and kind.triton >= TRITON


def _in_background(device: torch.device, call: Callable, *args, **kwargs) -> threading.Thread:
    def run():
        try:
            with torch.cuda.device(device):
                call(*args, **kwargs)
        except Exception:  # noqa: BLE001 - whoever needs the kernel compiles it himself, and gets the error
            pass

    # Not a daemon: the interpreter must not end amid a compilation.
    thread = threading.Thread(target=run)
    thread.start()
    return thread


def compile_step(problem: Problem, sinks: torch.Tensor | None, kind: Device, wait: float = 0.0) -> None:
    """Compile for the current device what one token of every sequence needs in each layer, in a cache's layout.

    Args:
        problem: see `step_after`.
        wait: seconds before it begins.
    """
    from .portable.kv_write_kernel import run_write  # needs Triton

    batch, heads, kv_heads = problem.batch_size, problem.num_heads, problem.num_kv_heads

    def new(*shape, dtype=problem.dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def token(num_heads, size):  # as layers make it: [B, heads, 1, size], the heads inside of the sequence
        return new(batch, 1, num_heads, size).transpose(1, 2)

    stored = torch.float8_e4m3fn if problem.fp8 else problem.dtype
    key_buffer = new(batch, kv_heads, SLOTS, problem.head_dim, dtype=stored)
    value_buffer = new(batch, kv_heads, SLOTS, problem.value_dim, dtype=stored)
    scales = [new(batch, kv_heads, dtype=torch.float32) for _ in "kv"] if problem.fp8 else [None, None]
    slot = new(1, dtype=torch.int64)
    key_range = as_key_range(new(batch, sequence_width(SLOTS), dtype=torch.int32), SLOTS)
    new_key, new_value = token(kv_heads, problem.head_dim), token(kv_heads, problem.value_dim)
    time.sleep(wait)
    compile_key_range()
    run_write(key_buffer, value_buffer, new_key, new_value, slot, 0, *scales)
    inputs = Inputs(token(heads, problem.head_dim), key_buffer, value_buffer, key_range, None, sinks, *scales)
    serve(choose(problem, kind), problem, inputs, token(heads, problem.value_dim), None)


class Ahead:
    """Kernels of calls on pages that are to come, compiled by threads in the background.

    The calls are made here on meta tensors, with which nothing is launched: so what is compiled is what they launch.

    Args:
        device: the GPU that will run them.
        first, later: name -> calls; those of `later` are begun when those of `first` are compiled.
    """

    def __init__(
        self, device: torch.device, first: dict[Hashable, Callable[[], None]], later: dict[Hashable, Callable[[], None]]
    ):
        self._keys: dict[Hashable, set] = {}
        self._thread: threading.Thread | None = None
        if not _can_compile(device):
            return
        # Here, as in `begin_compiling`.
        from .portable.paged import launch, write  # noqa: F401

        if device_of(device).arch == 90:
            from .hopper.paged import decode_launch  # noqa: F401
            from .hopper.paged import launch as hopper_launch  # noqa: F401

        with torch.cuda.device(device):
            stages = [self._plan(calls) for calls in (first, later)]
        stages = [list(stage.values()) for stage in stages]
        self._thread = _in_background(device, _compile_all, device, stages)

    def _plan(self, calls: dict[Hashable, Callable[[], None]]) -> dict:
        stage: dict = {}
        for name, call in calls.items():
            # A call that fails will fail again where it is made, and is told there.
            with planned_launches() as plan, suppress(Exception):
                call()
            self._keys[name] = set(plan)
            stage |= plan
        return stage

    def ready(self, name: Hashable) -> bool:
        """Whether the calls of this name wait for no kernel that is being compiled in the background."""
        return all(map(is_compiled, self._keys.get(name, ())))

    def wait(self) -> None:
        """Until all is compiled that can be."""
        if self._thread is not None:
            self._thread.join()


def _compile_all(device: torch.device, stages: list[list[Callable[[], None]]]) -> None:
    def compile_one(call: Callable[[], None]) -> None:
        with torch.cuda.device(device):  # each thread has its own
            call()

    for stage in stages:
        with ThreadPoolExecutor(THREADS) as pool:
            for call in stage:
                pool.submit(compile_one, call)

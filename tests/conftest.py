"""What all tests share: the interpreter where there is no GPU, and memory that is NaN until somebody writes it."""

import dataclasses
import functools
import gc
import os
import sys

# Workers beside each other, and what they start, have a core each; more threads would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

# Triton decides at its import whether functions are compiled or interpreted, so this stands before any of ours.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402


def pytest_collection_modifyitems(config, items):
    """`-m gpu` on a machine without one says so at each test instead of failing inside it."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU (and Triton's interpreter)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fill every uninitialised floating-point tensor with NaN: whatever the code forgets to write shows.

    Not torch.utils.deterministic.fill_uninitialized_memory: that needs deterministic algorithms, which forbid others.
    """

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    def wrap(original):
        return lambda *args, **kwargs: poison(original(*args, **kwargs))

    monkeypatch.setattr(torch, "empty", wrap(torch.empty))
    monkeypatch.setattr(torch, "empty_like", wrap(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", wrap(torch.Tensor.new_empty))


def with_a_large_stack():
    """call(f) -> f(), for an f whose inner loops call a lot.

    CPython keeps frames in chunks of 16 KiB, and maps and unmaps a chunk each time that calls cross its end: tens of
    thousands of times a second where a loop happens to lie there. A function with very many local variables gets a
    chunk that is large enough for all that it calls.
    """
    variables = "".join(f"        v{i} = 0\n" for i in range(20_000))
    namespace = {}
    exec(f"def call(f):\n    if f is None:\n{variables}    return f()", namespace)
    return namespace["call"]


@pytest.fixture(scope="session", autouse=True)
def quicker_interpreter():
    """Triton's interpreter without what takes most of its time and changes nothing that it computes.

    Tracing kernel bodies for coverage, which the report leaves out anyway; looking for garbage in all of Transformers;
    replacing all of triton.language by the interpreter's own functions again at each call of one jitted function by
    another, where the launch has done so; and asking after each sum of ints whether it overflowed (tests with ints that
    large ask for it: see `checked_sums`).
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    run, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    options = interpreter.interpreter_builder.options
    patched, call = set(), with_a_large_stack()

    def quickly(*args, **kwargs):
        tracer = sys.gettrace()
        sys.settrace(None)
        gc.disable()
        patched.clear()
        try:
            return call(lambda: run(*args, **kwargs))
        finally:
            gc.enable()
            sys.settrace(tracer)

    @functools.cache
    def modules(function) -> frozenset:
        # Globals hold triton.language or, in Triton's own library, triton.language.core.
        return frozenset(name for name, value in function.__globals__.items() if value is tl or value is tl.core)

    def patch_once(function):
        if modules(function) in patched:
            return None
        patched.add(modules(function))
        return patch(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = quickly, patch_once
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    yield
    interpreter.GridExecutor.__call__, interpreter._patch_lang = run, patch
    interpreter.interpreter_builder.options = options


@pytest.fixture
def checked_sums(monkeypatch):
    """An overflow of ints in a kernel raises, in Triton's interpreter."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)

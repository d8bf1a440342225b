"""What all tests share: the interpreter where there is no GPU, and memory that is NaN until somebody writes it."""

import os
import sys

import torch

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


@pytest.fixture(scope="session", autouse=True)
def quicker_interpreter():
    """Triton's interpreter without two things that take most of its time and change nothing that it computes.

    Tracing kernel bodies for coverage, which the report leaves out anyway; and replacing all of triton.language by the
    interpreter's own functions again at each call of one jitted function by another, where the launch has done so.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    run, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched = set()

    def untraced(*args, **kwargs):
        tracer = sys.gettrace()
        sys.settrace(None)
        patched.clear()
        try:
            return run(*args, **kwargs)
        finally:
            sys.settrace(tracer)

    def patch_once(function):
        # A function's globals hold triton.language or, in Triton's own library, triton.language.core.
        modules = frozenset(name for name, value in function.__globals__.items() if value is tl or value is tl.core)
        if modules in patched:
            return None
        patched.add(modules)
        return patch(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = untraced, patch_once
    yield
    interpreter.GridExecutor.__call__, interpreter._patch_lang = run, patch

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
def untraced_kernels():
    """Keep coverage out of the interpreter while it runs a kernel: tracing it takes as long again as all else.

    Kernel bodies are excluded from the report anyway.
    """
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        yield
        return
    original = GridExecutor.__call__

    def untraced(*args, **kwargs):
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            return original(*args, **kwargs)
        finally:
            sys.settrace(tracer)

    GridExecutor.__call__ = untraced
    yield
    GridExecutor.__call__ = original

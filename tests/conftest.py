"""What all tests share: the interpreter where there is no GPU, and memory that is NaN until somebody writes it."""

import dataclasses
import os

# Workers beside each other, and what they start, have a core each; more threads would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402

# Triton decides at its import whether functions are compiled or interpreted, so this stands before any of ours.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
from flashcore_kernels.runtime import workspace  # noqa: E402
from flashcore_kernels.runtime.interpreter import quick_interpreter  # noqa: E402


def pytest_collection_modifyitems(config, items):
    """What compiles comes first; `-m gpu` on a machine without one says so at each test instead of failing inside."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Workers steal from each other what is left to do. That had better be short at the end.
        items.sort(key=lambda item: item.path.name != "test_aot.py")
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
    # Partial sums are allocated too, where a stream would keep room for them that holds those of the call before.
    monkeypatch.setattr(workspace, "KEPT", 0)


@pytest.fixture(scope="session", autouse=True)
def quicker_interpreter():
    """No overflow checks either: tests with ints that large ask for `checked_sums`."""
    with quick_interpreter():
        yield


@pytest.fixture
def checked_sums(monkeypatch):
    """An overflow of ints in a kernel raises, in Triton's interpreter."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.fixture
def products_row_by_row(monkeypatch):
    """What a row of a product is must not depend on its place among the others, as on a GPU: some BLAS have it so."""
    matmul = np.matmul

    def by_rows(a, b, **options):
        return np.concatenate([matmul(a[row : row + 1], b, **options) for row in range(len(a))])

    monkeypatch.setattr(np, "matmul", by_rows)

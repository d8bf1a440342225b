"""Tests of the adapter: importing it registers the backend for the whole run."""

from collections import Counter
from pathlib import Path

import pytest
import transformers
from flashcore_kernels import op, path_counts, run
from flashcore_kernels.device import Device
from flashcore_kernels.fallback import forget_warnings

import flashcore_hf  # noqa: F401
from flashcore_hf import compat

transformers.logging.set_verbosity_error()

# Before 4.53 there is the helper alone: neither `attn_implementation="flashcore"` nor its mask function nor our caches.
if not compat.HAS_INTERFACE:
    _OF_THE_HELPER = ("legacy", "parity", "test_environment.py")
    collect_ignore = [path.name for path in Path(__file__).parent.glob("*") if path.name not in _OF_THE_HELPER]


@pytest.fixture
def paths():
    """Counter of attention calls by the path that served them, empty at the start of the test."""
    path_counts.clear()
    return path_counts


@pytest.fixture
def through_torch(monkeypatch, recwarn):
    """PyTorch instead of Triton's interpreter, for what is not about kernels: the same answers, much faster."""
    for module in (op, run):
        monkeypatch.setattr(module, "device_of", lambda device: Device("torch", reason="the test asks for it"))
    yield
    forget_warnings()


@pytest.fixture
def recorded(monkeypatch):
    """A tape in place of CUDA graphs, with a count of "recorded" and "replayed".

    PyTorch serves attention, because the interpreter is slow.
    """
    from flashcore_hf import decode_graph, graphs  # they need Transformers 4.57

    from . import tape

    counts = Counter()

    def record(step, device, kept):
        counts["recorded"] += 1
        replay, output = tape.record(step, device, kept)

        def counted():
            counts["replayed"] += 1
            replay()

        return counted, output

    monkeypatch.setattr(decode_graph, "record", record)
    monkeypatch.setattr(graphs, "unsupported_device", lambda model: None)
    for module in (op, run):
        monkeypatch.setattr(module, "device_of", lambda device: Device("torch", reason="this test is about graphs"))
    return counts

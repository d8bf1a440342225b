"""What is known of a machine, from what its driver says."""

import types

import pytest
import torch
from flashcore_kernels import device
from flashcore_kernels.choose import choose

from .test_choose import problem


def test_a_gpus_processors_are_counted(monkeypatch):
    """An H20 has 78 and an H200 132: a launch that counts on 132 would leave the one waiting for what never starts."""
    pytest.importorskip("flashcore_kernels.hopper.prefill.launch")
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=78)
    monkeypatch.setattr(device, "interprets", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which: properties)
    found = device.device_of.__wrapped__(torch.device("cuda", 0))
    assert (found.kind, found.arch, found.processors) == ("cuda", 90, 78)
    for num_queries in (1, 64):
        # With softcap, which the kernel of one program a tile has not.
        assert choose(problem(num_queries, aligned=True, softcap=5.0), found).config.processors == 78

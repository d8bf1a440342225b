"""The launches of a call that was watched, made again on another call's tensors. No GPU is needed."""

import types

import pytest
import torch
from flashcore_kernels.runtime import recording
from flashcore_kernels.runtime.recording import fresh, seen_as, watcher

from .test_repeated import Descriptor


class Compiled:
    """A compiled kernel that keeps what it was launched with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.launches = []

    def run(self, *arguments):
        self.launches.append(arguments)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)


def watched(given, compiled, foreign=None):
    """The Recording of a call with two launches, of which the second reads what the first wrote."""
    with recording.recording(given) as watched:
        partial = fresh(torch.empty(4, 8))
        output = fresh(torch.empty(2, 8, dtype=torch.float16))
        watcher().add_launch(compiled, (3, 1, 1), (Descriptor(given[0]), None, partial, 5), (0.5,))
        watcher().add_launch(compiled, (4, 2, 1), (partial, foreign if foreign is not None else given[1], output), ())
    return watched


def test_the_same_launches_on_other_tensors():
    compiled = Compiled()
    first, second = ((torch.zeros(2, 8), torch.zeros(3), None) for _ in "ab")
    again = watched(first, compiled).repeat()
    partial, output = again(second)
    assert (partial.shape, output.shape, output.dtype) == ((4, 8), (2, 8), torch.float16)
    one, two = compiled.launches
    start = (77, "function", "metadata", None, None, None)
    assert one[:9] == (3, 1, 1, *start) and two[:9] == (4, 2, 1, *start)
    described, *rest = one[9:]
    assert described.base is second[0] and described.shape == [2, 8]
    assert rest == [None, partial.data_ptr(), 5, 0.5]
    assert two[9:] == (partial.data_ptr(), second[1].data_ptr(), output.data_ptr())


def test_nothing_is_repeated_on_somebody_elses_tensor():
    given = torch.zeros(2, 8), torch.zeros(3), None
    watched_ = watched(given, Compiled(), foreign=torch.zeros(3))
    assert not watched_.complete
    with pytest.raises(ValueError, match="neither given nor allocated"):
        watched_.repeat()


def test_nothing_is_repeated_of_a_call_with_one_tensor_in_two_places():
    """attention(x, x, x) would have taught that all three lie where the last one does."""
    one = torch.zeros(2, 8)
    assert not watched((one, one, None), Compiled()).complete
    assert watched((one, one.clone(), None), Compiled()).complete


def test_a_view_stands_for_its_tensor():
    compiled = Compiled()

    def call(mask):
        with recording.recording((mask,)) as watched:
            fresh(torch.empty(4))
            watcher().add_launch(compiled, (1, 1, 1), (seen_as(mask.view(torch.uint8), mask),), ())
        return watched

    first, second = (torch.zeros(5, dtype=torch.bool) for _ in "ab")
    watched_ = call(first)
    assert watched_.complete
    watched_.repeat()((second,))
    assert compiled.launches[0][-1] == second.data_ptr()
    # The control: of a view that nobody announced, nothing is known.
    with recording.recording((first,)) as unannounced:
        watcher().add_launch(compiled, (1, 1, 1), (first.view(torch.uint8),), ())
    assert not unannounced.complete


def test_a_launch_that_fails_forgets_the_workspace(monkeypatch):
    forgotten = []
    monkeypatch.setattr(recording, "forget", forgotten.append)
    given = torch.zeros(2, 8), torch.zeros(3), None
    compiled = types.SimpleNamespace(run=None, function="function", packed_metadata="metadata")
    again = watched(given, compiled).repeat()
    with pytest.raises(TypeError):
        again(given)
    assert forgotten == [given[0].device] and watcher() is None

"""Which zeros, and which room for partial sums, a launch gets. No GPU is needed."""

import types

import pytest
import torch
from flashcore_kernels import counters as counters_module
from flashcore_kernels.counters import Counters


class TestCounters:
    """On a pretended GPU: which zeros a launch gets."""

    GPU = torch.device("cuda", 0)

    @pytest.fixture
    def own(self, monkeypatch):
        state = types.SimpleNamespace(capturing=False, stream=1, counters=Counters(), made=[])

        def zeros(count, device):
            state.made.append(count)
            return torch.zeros(count, dtype=torch.int32)

        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: state.stream, raising=False)
        monkeypatch.setattr(counters_module, "_lasting_zeros", zeros)
        monkeypatch.setattr(counters_module, "POOL", 20_000)
        return state

    def test_a_stream_keeps_its_own(self, own):
        first = own.counters.get(5, self.GPU)
        own.stream = 2
        other = own.counters.get(5, self.GPU)
        own.stream = 1
        assert own.counters.get(7, self.GPU).data_ptr() == first.data_ptr() != other.data_ptr()
        assert own.made == [20_000], "one pool for both"

    def test_each_recorded_launch_has_its_own(self, own):
        outside = own.counters.get(5, self.GPU)
        own.capturing = True
        recorded = [own.counters.get(5, self.GPU) for _ in range(3)]
        starts = [outside.data_ptr(), *(buffer.data_ptr() for buffer in recorded)]
        assert len(set(starts)) == 4 and all((start - starts[0]) % 16 == 0 for start in starts)
        assert all(abs(a - b) >= 5 * 4 for i, a in enumerate(starts) for b in starts[:i]), "and none overlap"

    def test_a_capture_never_makes_lasting_zeros(self, own, monkeypatch):
        own.capturing = True
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, **kwargs: zeros(*size, dtype=kwargs["dtype"]))
        assert own.counters.get(5, self.GPU).numel() == 5 and own.made == []

    def test_room_for_partial_sums_is_kept_for_a_stream(self, own):
        """A decode's workspace costs no allocation, and no two launches that may run at once share one."""
        (count, first), (_, again) = (own.counters.workspace(5, 1000, self.GPU) for _ in range(2))
        own.stream = 2
        other_count, other = own.counters.workspace(5, 1000, self.GPU)
        assert first.dtype == torch.float32 and first.numel() >= 1000 and count.numel() >= 5
        assert first.data_ptr() == again.data_ptr() != other.data_ptr() and count.data_ptr() != other_count.data_ptr()

    def test_room_that_no_stream_keeps(self, own, monkeypatch):
        made, empty = [], torch.empty
        monkeypatch.setattr(torch, "empty", lambda size, **_: made.append(size) or empty(size, dtype=torch.float32))
        own.counters.workspace(5, 1000, self.GPU)
        assert not made
        _, much = own.counters.workspace(5, counters_module.KEPT + 1, self.GPU)
        own.capturing = True
        recorded = [own.counters.workspace(5, 1000, self.GPU) for _ in range(2)]
        assert much.numel() > counters_module.KEPT and len(made) == 3, "much of it, and a graph's, are allocated"
        assert len({buffer.data_ptr() for pair in recorded for buffer in pair}) == 4

    def test_more_than_a_pool_holds(self, own):
        own.counters.get(5, self.GPU)
        assert own.counters.get(50_000, self.GPU).numel() == 50_000
        assert own.made == [20_000, 50_000]

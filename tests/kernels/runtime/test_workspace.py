"""Which memory a launch gets to hand partial sums over in. No GPU is needed."""

import types

import pytest
import torch
from flashcore_kernels.runtime import workspace as module
from flashcore_kernels.runtime.workspace import UNWRITTEN, Words, workspace

GPU = torch.device("cuda", 0)


@pytest.fixture
def own(monkeypatch):
    """On a pretended GPU: its state, and words of which a pool has 20,000."""
    state = types.SimpleNamespace(capture=0, stream=1, made=[], filled=[])
    full, empty = torch.full, torch.empty

    def lasting(value, count, device):
        state.made.append(count)
        return full((count,), value, dtype=torch.int32)

    def filled(size, value, dtype, device):
        state.filled.append(size[0])
        return full(size, value, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capture != 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: state.stream, raising=False)
    monkeypatch.setattr(module, "_capture", lambda stream: state.capture)
    monkeypatch.setattr(module, "_lasting", lasting)
    monkeypatch.setattr(module, "_partials", {})
    monkeypatch.setattr(torch, "full", filled)
    monkeypatch.setattr(torch, "empty", lambda size, **options: empty(size, dtype=options["dtype"]))
    state.words = Words(7, pool=20_000, least=1000, most=50_000, lent=200_000)
    for name in ("_counters", "_mailboxes"):
        value = getattr(module, name)._value
        monkeypatch.setattr(module, name, Words(value, pool=20_000, least=1000, most=50_000, lent=200_000))
    return state


class TestWords:
    def test_a_stream_keeps_its_own(self, own):
        first = own.words.get(5, GPU)
        own.stream = 2
        other = own.words.get(5, GPU)
        own.stream = 1
        assert own.words.get(700, GPU).data_ptr() == first.data_ptr() != other.data_ptr()
        assert own.made == [20_000] and not own.filled, "one pool for both"
        assert first.unique().tolist() == [7]

    def test_each_capture_has_its_own_for_each_stream(self, own):
        """Its graph may replay beside the stream's own launches, and beside other graphs."""
        starts = {own.words.get(5, GPU).data_ptr()}
        for own.capture, own.stream in ((8, 1), (8, 2), (9, 1)):
            buffers = [own.words.get(5, GPU) for _ in range(3)]
            assert len({buffer.data_ptr() for buffer in buffers}) == 1, "launches that follow each other share one"
            starts.add(buffers[0].data_ptr())
        starts = sorted(starts)
        assert len(starts) == 4 and all(start % 16 == starts[0] % 16 for start in starts)
        assert all(b - a >= 5 * 4 for a, b in zip(starts, starts[1:])), "and none overlap"

    def test_captures_that_replay_in_order_share_their_streams(self, own):
        """Those of servers, of which there are ever new ones; a stream of which nobody promises that keeps its own."""
        mine = own.words.get(5, GPU)
        own.capture = 1
        alone = own.words.get(5, GPU)
        with module.replayed_in_order():
            for own.capture in range(2, 400):
                assert own.words.get(700, GPU).data_ptr() == mine.data_ptr()
            larger, own.stream = own.words.get(2000, GPU), 2
            other = own.words.get(5, GPU)
        own.capture = 500
        outside = own.words.get(5, GPU)
        assert len({words.data_ptr() for words in (mine, alone, larger, other, outside)}) == 5
        assert own.made == [20_000] and not own.filled

    def test_a_capture_never_makes_a_pool(self, own):
        own.capture = 3
        assert own.words.get(5, GPU).unique().tolist() == [7] and own.filled == [5] and own.made == []
        own.capture = 0
        own.words.get(5, GPU)
        own.capture = 4
        own.words.get(5, GPU)
        assert own.filled == [5] and own.made == [20_000]

    def test_captures_that_use_a_pool_up(self, own):
        """The next call outside of them sees to it that there is another; what was handed out stays as it is."""
        mine = own.words.get(9000, GPU)
        own.capture = 1
        own.words.get(500, GPU)
        assert own.made == [20_000]
        own.capture = 2
        assert own.words.get(3000, GPU).unique().tolist() == [7] and own.filled == [3000], "filled at each replay"
        own.capture = 0
        assert own.words.get(10, GPU).data_ptr() == mine.data_ptr() and own.made == [20_000, 20_000]
        own.capture = 3
        theirs = own.words.get(3000, GPU)
        assert own.filled == [3000] and theirs.data_ptr() != mine.data_ptr()

    def test_captures_of_large_buffers_find_theirs(self, own):
        """A call before each, as a capture's warm-up is, and there are no more pools than captures and one."""
        for capture in range(1, 6):
            own.capture = 0
            own.words.get(30_000, GPU)
            own.capture = capture
            own.words.get(30_000, GPU)
        assert own.filled == [30_000], "the first capture found none"
        assert own.made == [32768] * 5

    def test_captures_without_end(self, own):
        """What they take for good is bounded, and so are the pools; behind that they fill their own."""
        for capture in range(1, 400):
            own.capture = 0
            own.words.get(5, GPU)
            own.capture = capture
            assert own.words.get(900, GPU).unique().tolist() == [7]
        assert sum(own.made) <= 240_000, "200,000 for captures, and what streams have"
        assert 200 <= len(own.filled) <= 220
        own.capture, own.stream = 0, 5
        before = len(own.filled)
        assert own.words.get(900, GPU).data_ptr() == own.words.get(900, GPU).data_ptr()
        assert len(own.filled) == before, "a stream's own launches are served as before"

    def test_more_than_a_pool_holds(self, own):
        own.words.get(5, GPU)
        assert own.words.get(30_000, GPU).numel() >= 30_000 and own.made == [20_000, 32768]
        assert own.words.get(5, GPU).numel() >= 30_000, "and the stream keeps it"

    def test_more_than_a_stream_keeps(self, own):
        kept = own.words.get(5, GPU)
        for capture in (0, 6):
            own.capture = capture
            assert own.words.get(50_001, GPU).unique().tolist() == [7]
        own.capture = 0
        assert own.filled == [50_001] * 2 and own.made == [20_000]
        assert own.words.get(5, GPU).data_ptr() == kept.data_ptr()

    def test_a_launch_that_failed(self, own):
        before = own.words.get(5, GPU)
        before.fill_(3)
        own.words.forget(GPU)
        assert own.words.get(5, GPU).unique().tolist() == [7]

    def test_a_buffer_that_is_not_forgotten_would_show(self, own):
        own.words.get(5, GPU).fill_(3)
        assert own.words.get(5, GPU).unique().tolist() == [3]


class TestWorkspace:
    def test_mailboxes_are_unwritten(self, own):
        mailboxes, count = workspace(1000, 0, GPU)
        assert mailboxes.dtype == torch.int32 and mailboxes.numel() >= 1000 and count is None
        assert mailboxes.unique().tolist() == [UNWRITTEN]
        assert torch.tensor([UNWRITTEN], dtype=torch.int32).view(torch.float32).isnan()

    def test_one_chunk_needs_none(self, own):
        assert workspace(0, 0, GPU) == (None, None) and own.made == []

    def test_room_for_partial_sums_is_kept_for_a_stream(self, own):
        """A decode's workspace costs no allocation, and no two launches that may run at once share one."""
        (first, count), (again, _) = (workspace(1000, 5, GPU) for _ in range(2))
        own.stream = 2
        other, other_count = workspace(1000, 5, GPU)
        assert first.dtype == torch.float32 and first.numel() >= 1000 and count.numel() >= 5 and not count.any()
        assert first.data_ptr() == again.data_ptr() != other.data_ptr() and count.data_ptr() != other_count.data_ptr()

    def test_room_that_no_stream_keeps(self, own):
        kept, _ = workspace(1000, 5, GPU)
        much, _ = workspace(module.KEPT + 1, 5, GPU)
        own.capture = 1
        recorded = [workspace(1000, 5, GPU)[0] for _ in range(2)]
        assert much.numel() > module.KEPT, "much of it, and a graph's, are allocated"
        assert len({room.data_ptr() for room in (kept, much, *recorded)}) == 4

    def test_counters_alone(self, own):
        """Of tiles that are drawn: they start at zero, and there is nothing to hand over."""
        sums, count = workspace(0, 5, GPU)
        assert sums is None and count.dtype == torch.int32 and count.numel() >= 5 and not count.any()

    def test_a_launch_that_failed_takes_both(self, own):
        for sizes in ((0, 5), (1000, 0)):
            (before,) = (words for words in workspace(*sizes, GPU) if words is not None)
            module.forget(GPU)
            (after,) = (words for words in workspace(*sizes, GPU) if words is not None)
            assert before.data_ptr() != after.data_ptr()

    @pytest.mark.parametrize("partials, counters", [(0, 0), (7, 0), (0, 7), (7, 8)])
    def test_on_meta_nothing_is_taken(self, own, partials, counters):
        """Where a kernel is only compiled: the same dtypes, and no pool."""
        given = workspace(partials, counters, torch.device("meta"))
        sums = torch.float32 if counters else torch.int32
        assert [None if words is None else words.dtype for words in given] == [
            sums if partials else None, torch.int32 if counters else None,
        ]  # fmt: skip
        assert own.made == []

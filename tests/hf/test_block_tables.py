"""Block tables of continuous batching's batches: a line is written where its pages are others, and only there."""

import random
from types import SimpleNamespace

import pytest
import torch

from flashcore_hf import block_tables, compat, serving

if compat.continuous_batching() is None or serving.why_not() is not None:
    pytest.skip(f"supported for {serving.SUPPORTED}", allow_module_level=True)


class Base:
    """What the class that prepares a batch's tensors does with its tables."""

    max_requests_per_batch, num_q_tokens = 3, 3

    def __init__(self, device="cpu"):
        self.block_table = torch.empty(1, 3, 4, dtype=torch.int32, device=device)
        self._bulk_input_tensor = torch.empty(4)

    def prepare_batch_tensors(self, requests, processors, single, num_q_tokens, max_kv_read, use_padding):
        assert self.block_table.numel() > 0
        self._reset_static_tensors()
        for line, name in enumerate(requests):
            self.cache.fill_block_table(name, 5, 1, self.block_table[:, line])

    def _reset_static_tensors(self, full_reset=False):
        self.block_table[:, :3].fill_(-1)


def made(groups, width=4):
    io = Base()
    block_tables.take_over_io(io, len(groups), width)
    lines = [block_tables.LinesOf(group, number) for number, group in enumerate(groups)]
    io.cache = SimpleNamespace(fill_block_table=lambda *a: block_tables.fill_lines(lines, *a))
    return io


def prepare(io, requests):
    io.prepare_batch_tensors(requests, None, True, 3, 0, True)
    return io.block_table


@pytest.fixture
def written(monkeypatch):
    """How many lines are written."""
    count = []

    class Array:
        def __init__(self, array):
            self.array = array

        def __setitem__(self, index, entries):
            count.append(index[:2])
            self.array[index] = entries

    init = block_tables._Numbers.__init__

    def counting(self, *arguments):
        init(self, *arguments)
        self.arrays = Array(self.arrays)

    monkeypatch.setattr(block_tables._Numbers, "__init__", counting)
    return count


def test_lines_are_those_of_their_requests(written):
    """Through pages that come, requests that go and change places, and pages that are given to others."""
    full, ring = SimpleNamespace(block_table={}), SimpleNamespace(block_table={})
    io = made([full, ring])
    chance = random.Random(0)
    for step in range(200):
        names = chance.sample("abcdef", 3)
        for group in (full, ring):
            for name in names:
                if name not in group.block_table or chance.random() < 0.2:
                    group.block_table[name] = [chance.randrange(50) for _ in range(chance.randint(1, 3))]
                elif chance.random() < 0.2 and len(group.block_table[name]) < 4:
                    group.block_table[name].append(chance.randrange(50))  # in place, as allocators do it
        table = prepare(io, names)
        for number, group in enumerate((full, ring)):
            for line, name in enumerate(names):
                blocks = group.block_table[name]
                assert table[number, line, : len(blocks)].tolist() == blocks, step


def test_nothing_is_written_again(written):
    group = SimpleNamespace(block_table={"a": [3, 4], "b": [5], "c": [1]})
    io = made([group])
    prepare(io, "abc")
    assert len(written) == 3
    prepare(io, "abc")
    assert len(written) == 3
    group.block_table["b"].append(7)
    prepare(io, "abc")
    assert written[3:] == [(0, 1)]
    prepare(io, "acb")
    assert written[4:] == [(0, 1), (0, 2)]


def test_pages_of_all_layers_in_a_block():
    """As from 5.23 on: a block holds a page of each layer of the group, and groups say which number they have."""
    one, other = (
        SimpleNamespace(block_table={"a": [3]}, index=index, block_physical_stride=96, tokens_per_page=16)
        for index in (1, 0)
    )
    other.block_table["a"] = [2]
    table = prepare(made([one, other]), "a")
    assert table[:, 0, 0].tolist() == [12, 18]


def test_a_request_that_is_too_long():
    group = SimpleNamespace(block_table={"a": [1, 2, 3, 4, 5]})
    io = made([group])
    with pytest.raises(ValueError, match="request a has 6 tokens, more than four times"):
        prepare(io, "a")
    assert isinstance(io.block_table, torch.Tensor)


@pytest.mark.parametrize("seed", range(20))
def test_carried_tokens(seed):
    """As Transformers finds them."""
    chance = random.Random(seed)
    kind = compat.batching_module().input_outputs.ContinuousBatchingAsyncIOs

    def positions():
        names = chance.sample(range(30), chance.randint(0, 12))
        return dict(zip(map(str, names), sorted(chance.sample(range(64), len(names)))))

    pairs = [SimpleNamespace(host_io=SimpleNamespace(req_id_to_new_token_position=positions())) for _ in "ab"]
    ios = SimpleNamespace(io_pairs=pairs, current_pair=seed % 2, max_batch_tokens=64)
    want = kind.infer_carry_over_ids(ios)
    got = block_tables._Pairs.infer_carry_over_ids(ios)
    assert got.dtype == want.dtype and torch.equal(got, want)
    pairs.reverse()
    moved = block_tables._Pairs.infer_carry_over_ids(ios)
    assert not torch.equal(moved, want) or (want == -1).all(), "which batch was before matters"


def test_asynchronous_batching_is_taken_over():
    kind = compat.batching_module().input_outputs.ContinuousBatchingAsyncIOs
    ios = kind.__new__(kind)
    block_tables.take_over_pairs(ios)
    assert isinstance(ios, kind) and type(ios).infer_carry_over_ids is block_tables._Pairs.infer_carry_over_ids
    assert kind.infer_carry_over_ids is not block_tables._Pairs.infer_carry_over_ids

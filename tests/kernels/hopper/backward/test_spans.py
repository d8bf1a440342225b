"""Which queries see a block of keys, with a key range a query: what the interpreter finds, beside all pairs."""

import pytest
import torch
from flashcore_kernels import make_row_ranges
from flashcore_kernels.device import Device
from flashcore_kernels.hopper.backward.choose import choose_hopper_backward
from flashcore_kernels.key_range import visible

from .test_backward import inputs_of, problem

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from flashcore_kernels.hopper.backward import launch, spans  # noqa: E402


def documents(lengths, num_queries):
    """Causal documents behind each other; what is behind the last sees nothing."""
    first = torch.repeat_interleave(torch.tensor([0, *lengths[:-1]]).cumsum(0), torch.tensor(lengths))
    end = torch.arange(1, len(first) + 1)
    return [torch.nn.functional.pad(t, (0, num_queries - len(first))) for t in (first, end)]


def arbitrary(num_queries, num_keys, seed):
    """In no order, some of them empty, some beyond the keys."""
    drawn = torch.randint(-9, num_keys + 9, (2, num_queries), generator=torch.Generator().manual_seed(seed))
    first, end = drawn.amin(0), drawn.amax(0)
    return first, torch.where(torch.arange(num_queries) % 7 == 3, first, end)


RANGES = {  # (first, end) of each query, and how many keys there are
    "documents": (*documents([70, 1, 200, 29, 333], 640), 640),
    "one document": (*documents([640], 640), 640),
    "few of the keys": (*documents([70, 200], 300), 777),
    "blocks": (torch.arange(500) // 256 * 256, torch.arange(500) // 256 * 256 + 256, 500),
    "prefix": (torch.zeros(333, dtype=torch.int64), torch.arange(1, 334).clamp(min=140), 333),
    "arbitrary": (*arbitrary(333, 200, 0), 200),
    "far apart": (torch.tensor([0, 500, 0, 600] * 100), torch.tensor([40, 540, 9, 640] * 100), 640),
    "nothing": (torch.zeros(100, dtype=torch.int64), torch.zeros(100, dtype=torch.int64), 100),
    "two runs": (*torch.tensor([[0, 200] * 2, [200, 400] * 2]).repeat_interleave(130, 1), 400),
}  # fmt: skip
# Neighbours see keys far apart: of a block of queries its first and last key are known, and not what it leaves out.
SCATTERED = ("arbitrary", "far apart")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("scan", [2, 256])
@pytest.mark.parametrize("name", RANGES)
def test_spans(name, scan, head_dim, monkeypatch):
    """Blocks of queries that see a key are found, none of the others at the ends, and whole is what hides nothing."""
    monkeypatch.setattr(launch, "SCAN", scan)
    first, end, num_keys = RANGES[name]
    num_queries = len(first)
    turned = make_row_ranges(torch.stack((first, first.flip(0))), torch.stack((end, end.flip(0))), num_keys)
    call = problem(num_queries=num_queries, num_keys=num_keys, range_layout="rows", head_dim=head_dim)
    config = choose_hopper_backward(call, Device("cuda", 90, triton=(3, 6))).config
    block_m = config.row.dkdv.block_m
    found = launch.launch_spans(call, config, turned)
    seen = visible(turned, num_queries, num_keys)[:, 0]  # [B, Q, K]
    assert found.shape == (2, -(-num_keys // 64) + 1, 8)
    whole_blocks = 0
    for b in range(2):
        blind = ~seen[b].any(-1)
        for span, (begin, stop, whole_begin, whole_end, *bits, may_be_blind, _) in enumerate(found[b].tolist()):
            keys = seen[b, :, 64 * span : 64 * span + 64]
            see = (keys.any(-1).nonzero()[:, 0] // block_m).tolist()
            if name not in SCATTERED:
                assert (begin, stop) == (min(see), max(see) + 1) if see else stop == 0
            elif see:
                assert begin <= min(see) and stop > max(see)
            for i in range(max(begin, whole_begin), min(stop, whole_end)):
                block = slice(i * block_m, (i + 1) * block_m)
                assert keys[block][~blind[block]].all()
                whole_blocks += 1
            want = keys.any(0).tolist()
            got = [bool(bits[k // 32] >> k % 32 & 1) for k in range(64)]
            assert got == want + [True] * (64 - len(want))
            if see and blind[begin * block_m : stop * block_m].any():
                assert may_be_blind
            if not blind.any():
                assert not may_be_blind
    assert (whole_blocks > 0) == (
        name in ("documents", "one document", "few of the keys", "blocks", "prefix", "two runs")
    )


def test_no_whole_block_is_left_out_of_documents():
    """What is not known to be whole is masked, and that takes time."""
    first, end, num_keys = RANGES["one document"]
    key_range = make_row_ranges(first[None], end[None], num_keys)
    call = problem(batch_size=1, num_queries=640, num_keys=640, range_layout="rows", head_dim=128)
    config = choose_hopper_backward(call, Device("cuda", 90, triton=(3, 6))).config
    for span, (begin, stop, whole_begin, whole_end, *_) in enumerate(
        launch.launch_spans(call, config, key_range)[0].tolist()
    ):
        whole = span + 1 if span < 9 else 10
        assert (begin, stop, whole_begin, whole_end) == ((span, 10, whole, 10) if span < 10 else (10, 0, 10, 10))


def test_what_is_left_of_documents_costs_nothing():
    """Keys that no query sees have no blocks of queries, and documents only their own."""
    first, end = documents([128, 256, 128], 640)
    call = problem(batch_size=1, num_queries=640, num_keys=640, range_layout="rows", head_dim=128)
    config = choose_hopper_backward(call, Device("cuda", 90, triton=(3, 6))).config
    found = launch.launch_spans(call, config, make_row_ranges(first[None], end[None], 640))[0]
    runs = [list(range(begin, stop)) for begin, stop, *_ in found.tolist()]
    assert runs == [[0, 1], [1], [2, 3, 4, 5], [3, 4, 5], [4, 5], [5], [6, 7], [7], [], [], []]
    assert spans.SCAN == 256


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(333, 200), (200, 333), (333, 333)])
def test_blocks_of_queries_are_the_same_for_all_kernels(num_queries, num_keys, head_dim):
    """Spans number blocks from query 0 on. Where query 0 stands, before the first key or not, moves none of them."""
    first, end = documents([70, 1, 100, 20], num_queries)
    key_range = make_row_ranges(first[None], end[None], num_keys)
    call = problem(
        batch_size=1, num_queries=num_queries, num_keys=num_keys, query_start=num_keys - num_queries,
        range_layout="rows", head_dim=head_dim, scale=1.0,
    )  # fmt: skip
    config = choose_hopper_backward(call, Device("cuda", 90, triton=(3, 6))).config
    rows = torch.full((2, 4, launch.places_of(call, config.row)), torch.nan)
    lse = torch.arange(4.0 * num_queries).view(1, 4, num_queries)
    output = torch.zeros(1, 4, num_queries, 64)
    launch.launch_rows(call, config, inputs_of(key_range), output, lse, output, None, rows)
    assert torch.equal(-rows[0, :, :num_queries], lse[0])
    assert (rows[0, :, num_queries:] == -torch.inf).all()
    # The others shift their blocks by where query 0 stands, as `preprocess` does.
    assert launch._visibility(call, key_range)[2] == 0

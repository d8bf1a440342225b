"""Bitwise the same: repeated, in a batch, on two streams at once, with a graph replaying beside eager calls."""

import pytest
import torch
from flashcore_kernels import attention, make_key_range, op, path_counts
from flashcore_kernels.runtime import prepared

from ..kernels.reference import build

SHAPES = {
    "decode": dict(num_queries=1, num_keys=3000, head_dim=128),
    "decode of 5": dict(num_queries=5, num_keys=777, head_dim=64),
    "prefill": dict(num_queries=513, num_keys=513, head_dim=128),
    "prefill, head_dim 64": dict(num_queries=300, num_keys=1000, head_dim=64),
    "prefill, head_dim 256": dict(num_queries=300, num_keys=400, head_dim=256),
    "prefill, fp32": dict(num_queries=300, num_keys=400, head_dim=96, dtype=torch.float32),
}


def make(name: str, features=("causal",), **changes):
    options = {"batch_size": 4, "heads": (16, 4), "dtype": torch.bfloat16, "device": "cuda", **SHAPES[name], **changes}
    return build(features, **options)


@pytest.mark.parametrize("name", SHAPES)
def test_repeats(name):
    call = make(name)
    first = call.run()
    for _ in range(200):
        assert torch.equal(call.run(), first)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("name", SHAPES)
def test_alone_batched_and_padded(name, softcap):
    """Each sequence of a left-padded batch gives the bits that it gives alone."""
    call = make(name, ())
    batch_size, num_keys, num_queries = 4, call.key.shape[2], call.query.shape[2]
    first = torch.tensor([0, 3, 77, 129], device="cuda")
    padded = make_key_range(batch_size, num_keys, first=first, query_start=num_keys - num_queries, right=0)
    batched = attention(call.query, call.key, call.value, key_range=padded, softcap=softcap)
    for b, start in enumerate(first.tolist()):
        real = min(num_queries, num_keys - start)
        query = call.query[b : b + 1, :, num_queries - real :]
        key, value = call.key[b : b + 1, :, start:], call.value[b : b + 1, :, start:]
        alone = attention(query, key, value, is_causal=True, softcap=softcap)
        assert torch.equal(batched[b : b + 1, :, num_queries - real :], alone)


def test_inverse_blocks_that_do_not_start_at_the_first_key(monkeypatch):
    """The test above would see blocks that start at slot 0: then padding moves the sums.

    By the kernel of every GPU, which takes both calls: two kernels would differ in any case.
    """
    here = op.device_of(torch.device("cuda", torch.cuda.current_device()))
    monkeypatch.setattr(op, "device_of", lambda device: here._replace(triton=(0, 0)))
    monkeypatch.setattr(prepared, "_calls", {})
    path_counts.clear()
    call = make("decode", ())
    num_keys = call.key.shape[2]
    hidden = torch.zeros(4, 1, 1, num_keys, dtype=torch.bool, device="cuda")
    hidden[..., 77:] = True
    masked = attention(call.query, call.key, call.value, mask=hidden)
    alone = attention(call.query, call.key[:, :, 77:], call.value[:, :, 77:])
    torch.testing.assert_close(masked, alone, atol=1e-2, rtol=1e-2)
    assert set(path_counts) == {"flashcore_decode"}
    assert not torch.equal(masked, alone)


@pytest.mark.parametrize(
    "names", [("decode", "decode of 5"), ("prefill", "prefill"), ("prefill, head_dim 64", "prefill, head_dim 256")]
)
def test_two_streams_at_once(names):
    calls = [make(name, seed=seed) for seed, name in enumerate(names)]
    want = [call.run() for call in calls]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    answers = [[], []]
    for _ in range(200):
        for call, stream, answer in zip(calls, streams, answers):
            with torch.cuda.stream(stream):
                answer.append(call.run())
    torch.cuda.synchronize()
    for answer, expected in zip(answers, want):
        assert all(torch.equal(one, expected) for one in answer)


@pytest.mark.parametrize("name", SHAPES)
def test_graph_replays_beside_eager_calls(name):
    call = make(name)
    want = call.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.run()
    side, here = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(here)
    eager = []
    for _ in range(100):
        captured.fill_(float("nan"))
        side.wait_stream(here)
        with torch.cuda.stream(side):
            graph.replay()
        eager.append(call.run())
        here.wait_stream(side)
        assert torch.equal(captured, want)
    assert all(torch.equal(one, want) for one in eager)


def test_one_graph_serves_every_length():
    """Lengths are read from the device: the graph is captured once, the KeyRange is overwritten."""
    call = make("decode", ())
    num_keys = call.key.shape[2]
    key_range = make_key_range(4, num_keys, end=num_keys, query_start=num_keys - 1, right=0, device="cuda")
    attention(call.query, call.key, call.value, key_range=key_range)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(call.query, call.key, call.value, key_range=key_range)
    for length in (1, 2, 127, 128, 129, 1000, 2047, 3000):
        now = make_key_range(4, num_keys, end=length, query_start=length - 1, right=0, device="cuda")
        key_range[:, :, :1].copy_(now[:, :, :1])
        graph.replay()
        want = attention(call.query, call.key[:, :, :length], call.value[:, :, :length], is_causal=True)
        assert torch.equal(captured, want), length


def test_nothing_leaks():
    call = make("decode")
    for _ in range(3):
        call.run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        call.run()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before

"""Decode calls that go past the dispatcher because one like them was made before: the same bits, the same errors."""

import pytest
import torch
from flashcore_kernels import attention, make_key_range, path_counts, prepared

from ..kernels.reference import build, check


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(prepared, "_prepared", {})


def call_of(features=(), num_keys=300, **more):
    return build(features, 1, num_keys, head_dim=128, dtype=torch.bfloat16, device="cuda", **more)


def parts(answer) -> tuple[torch.Tensor, ...]:
    return answer if isinstance(answer, tuple) else (answer,)


@pytest.mark.parametrize("features", [(), ("causal",), ("left-padding", "lse"), ("sinks", "window"), ("softcap",)])
@torch.no_grad()
def test_same_bits_as_through_the_operator(features):
    calls = call_of(features), call_of(features, seed=1)
    want = [call.run() for call in calls[::-1]][::-1]  # each the first of its kind, or the second
    prepared._prepared.clear()
    for call, expected in zip(calls, want):
        path_counts.clear()
        answer = call.run()
        decode = "flashcore_hopper_decode" if torch.cuda.get_device_capability()[0] == 9 else "flashcore_decode"
        assert len(prepared._prepared) == 1 and dict(path_counts) == {decode: 1}
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(parts(answer), parts(expected), strict=True))
        check(call)


@torch.no_grad()
def test_what_decides_is_in_the_signature():
    """Each of these differs from the first call in one thing, and must not be served as it was."""
    call = call_of()
    call.run()
    for other in (
        call_of(num_keys=301),
        call_of(heads=(4, 1)),
        call_of(heads=(4, 4)),
        call_of(batch_size=3),
        call_of(("softcap",)),
        call_of(("window",)),
        call_of(("strides",)),
        call_of(("unfilled",)),
    ):
        check(other)
    off = torch.empty(call.key.numel() + 1, dtype=torch.bfloat16, device="cuda")[1:].view_as(call.key)
    check(call._replace(key=off.copy_(call.key)))
    check(call._replace(arguments={"scale": 0.3}))
    assert len(prepared._prepared) == 11


@torch.no_grad()
def test_bad_input_is_still_refused():
    call = call_of()
    call.run()
    with pytest.raises(ValueError, match="KeyRange"):
        call.run(key_range=make_key_range(2, 200, device="cuda"))
    with pytest.raises(ValueError, match="device"):
        attention(call.query, call.key, call.value.cpu())
    with pytest.raises(ValueError, match="dtype"):
        attention(call.query, call.key, call.value.half())


def test_gradients_go_another_way():
    call = call_of()
    with torch.no_grad():
        call.run()
    query = call.query.clone().requires_grad_()
    attention(query, call.key, call.value).sum().backward()
    assert query.grad is not None


@torch.no_grad()
def test_two_streams_and_a_graph():
    """Counters are per stream, and a graph's launches have their own."""
    call = call_of(num_keys=4000)
    want = call.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [call.run() for _ in range(4)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(200):
        graph.replay()
        answers = []
        for stream in streams:
            with torch.cuda.stream(stream):
                answers.append(call.run())
        torch.cuda.synchronize()
        assert all(torch.equal(answer, want) for answer in (*answers, *captured))

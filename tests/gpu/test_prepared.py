"""Calls that go past the dispatcher because one like them was made before: the same bits, the same errors."""

from functools import partial

import pytest
import torch
from flashcore_kernels import attention, make_key_range, path_counts, step_key_range
from flashcore_kernels.runtime import prepared

from ..kernels.reference import build, check


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(prepared, "_calls", {})


def call_of(features=(), num_keys=300, num_queries=1, head_dim=128, **more):
    return build(features, num_queries, num_keys, head_dim=head_dim, dtype=torch.bfloat16, device="cuda", **more)


def kernel_for(num_queries: int) -> str:
    hopper = torch.cuda.get_device_capability()[0] == 9
    if num_queries == 1:
        return "flashcore_hopper_decode" if hopper else "flashcore_decode"
    return "flashcore_hopper" if hopper else "flashcore_forward"


def parts(answer) -> tuple[torch.Tensor, ...]:
    return answer if isinstance(answer, tuple) else (answer,)


@pytest.mark.parametrize("num_queries, head_dim", [(1, 128), (200, 128), (200, 64), (200, 192)])
@pytest.mark.parametrize("features", [(), ("causal",), ("left-padding", "lse"), ("sinks", "window"), ("softcap",)])
@torch.no_grad()
def test_same_bits_as_through_the_operator(features, num_queries, head_dim, monkeypatch):
    """Of the first call of its kind, which goes straight to a launch, and of the second."""
    calls = [call_of(features, 1100, num_queries, head_dim, seed=seed) for seed in (0, 1)]
    with monkeypatch.context() as patched:
        patched.setattr(prepared, "goes_past_dispatcher", lambda tensor: False)
        want = [call.run() for call in calls]
    assert not prepared._calls
    for call, expected in zip(calls, want):
        path_counts.clear()
        answer = call.run()
        assert len(prepared._calls) == 1 and dict(path_counts) == {kernel_for(num_queries): 1}
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(parts(answer), parts(expected), strict=True))
        check(call)


@pytest.mark.parametrize("num_queries, head_dim", [(200, 64), (200, 128), (200, 256)])
@pytest.mark.parametrize("kind", ["bool", "bias", "bias of a row", "float64", "rows that must be copied"])
@torch.no_grad()
def test_dense_masks_have_the_same_bits_as_through_the_operator(kind, num_queries, head_dim, monkeypatch):
    """Also the third call of a kind, on new tensors: its launches are made again."""
    rows, columns = (
        (1 if kind == "bias of a row" else num_queries),
        (299 if kind == "rows that must be copied" else 304),
    )
    calls = []
    for seed in range(3):
        call = call_of(("causal",), num_keys=columns, num_queries=num_queries, head_dim=head_dim, seed=seed)
        generator = torch.Generator("cuda").manual_seed(seed)
        mask = torch.randn(2, 1, rows, columns, device="cuda", generator=generator)
        mask = mask > -1.0 if kind == "bool" else mask.to(torch.float64 if kind == "float64" else torch.bfloat16)
        calls.append((call, mask))
    with monkeypatch.context() as patched:
        patched.setattr(prepared, "goes_past_dispatcher", lambda tensor: False)
        wants = [call.run(mask=mask) for call, mask in calls]
    assert not prepared._calls
    for (call, mask), want in zip(calls, wants):
        assert torch.equal(call.run(mask=mask), want) and len(prepared._calls) == 1
    other_mask = calls[0][0].run(mask=calls[1][1])
    assert not torch.equal(other_mask, wants[0]), "negative control: the mask is read"


@torch.no_grad()
def test_one_address_in_many_shapes():
    """What the copy engine was told of the memory at an address never serves another kind of call."""
    memory = torch.randn(3, 1 << 20, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        for shape in ((2, 300, 8, 64), (1, 600, 8, 64), (2, 300, 4, 128), (4, 300, 4, 64)):
            views = [part[: torch.Size(shape).numel()].view(shape).transpose(1, 2) for part in memory]
            got = attention(*views, is_causal=True)
            apart = [torch.empty(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in views]
            want = attention(*(copy.copy_(view) for copy, view in zip(apart, views)), is_causal=True)
            assert torch.equal(got, want)


@pytest.mark.parametrize("num_queries", [1, 200])
@torch.no_grad()
def test_what_decides_is_in_the_signature(num_queries):
    """Each of these differs from the first call in one thing, and must not be served as it was."""

    like = partial(call_of, num_queries=num_queries)
    call = like()
    call.run()
    for other in (
        like(num_keys=301),
        like(heads=(4, 1)),
        like(heads=(4, 4)),
        like(batch_size=3),
        like(("softcap",)),
        like(("window",)),
        like(("strides",)),
        like(("unfilled",)),
    ):
        check(other)
        check(other)  # the second is served by what the first left
    off = torch.empty(call.key.numel() + 1, dtype=torch.bfloat16, device="cuda")[1:].view_as(call.key)
    check(call._replace(key=off.copy_(call.key)))
    check(call._replace(arguments={"scale": 0.3}))
    assert len(prepared._calls) == 11


@pytest.mark.parametrize("num_keys", [40, 4097, 20000])
@pytest.mark.parametrize("on_device", [False, True])
def test_a_steps_key_range_is_that_of_the_operators(num_keys, on_device):
    generator = torch.Generator().manual_seed(num_keys)
    mask = torch.rand(5, num_keys, generator=generator) < torch.tensor([0.5, 1.1, -1.0, 0.999, 0.001])[:, None]
    mask = torch.cat([mask, torch.arange(num_keys)[None] >= num_keys // 3])
    start = torch.tensor(num_keys - 1) if on_device else num_keys - 1
    want = make_key_range(6, num_keys, query_start=start, left=70, right=0, key_mask=mask)
    mask, start = mask.cuda(), start.cuda() if on_device else start
    assert step_key_range._in_one_launch(mask, start, mask.device)
    for given in (mask, mask.T.contiguous().T):
        got = step_key_range.make_step_key_range(6, num_keys, query_start=start, left=70, right=0, key_mask=given)
        assert torch.equal(got.cpu(), want)


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

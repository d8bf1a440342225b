"""The Gluon decode kernel against float64 by the error rule: features, head dimensions, seeded calls; and its bits."""

import random

import pytest
import torch
from flashcore_kernels import attention, explain, make_key_range, path_counts
from flashcore_kernels.hopper.decode import launch as decode_launch
from flashcore_kernels.hopper.decode import sharing, table
from flashcore_kernels.runtime import prepared, workspace

from ..kernels import test_fp8
from ..kernels.reference import RANGES, assert_right, build, check, together

if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("the Gluon kernel is for compute capability 9.0", allow_module_level=True)

FEATURES = ("causal", "window", "softcap", "sinks", *RANGES, "gqa-7to1", "mqa", "lse", "strides")
SHAPING = ("causal", "window", *RANGES)  # cost no compilation, but for the range
HEAD_DIMS = (64, 96, 128, 192, 256)
DTYPES = (torch.float16, torch.bfloat16)


def on_hopper(call):
    """Check `call`, and that it was the Gluon kernel's."""
    path_counts.clear()
    out = check(call)
    assert set(path_counts) == {"flashcore_hopper_decode"}, explain(call.query, call.key, call.value)
    return out


@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature):
    for features in ((feature,), (feature, "causal"), (feature, "window", "left-padding")):
        if all(together(feature, other) for other in features[1:]):
            for num_queries, num_keys in ((1, 129), (1, 1000), (4, 300), (16, 1100)):
                dtype = torch.bfloat16
                on_hopper(build(features, num_queries, num_keys, head_dim=128, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 72, 80, 96, 120, 128, 160, 192, 200, 256])
def test_head_dims(head_dim, dtype):
    for features in (("causal", "lse"), ("causal", "value-dim") if head_dim % 16 == 8 else ("causal",)):
        on_hopper(build(features, 3, 333, head_dim=head_dim, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("features", [("causal",), ("left-padding", "causal"), ("lse",)], ids="+".join)
def test_mla(features):
    call = build(features, 2, 700, heads=(8, 8), head_dim=192, dtype=torch.bfloat16, device="cuda")
    on_hopper(call._replace(value=call.value[..., :128].contiguous()))
    on_hopper(call._replace(value=call.value[..., 64:]))


HEADS = ((4, 2), (8, 1), (3, 3), (12, 4), (14, 2), (32, 8), (5, 1), (20, 1))


def draw_call(seed: int, block: int):
    """What chooses a compiled kernel is the block's, but for whether there are several chunks; the rest the seed's."""
    fixed = random.Random(block)
    head_dim = fixed.choice((64, 64, 128, 128, 96, 80, 192, 256))
    features = [flag for flag in ("softcap", "sinks", "lse", "strides") if fixed.random() < 0.3]
    ranges = fixed.random() < 0.6
    num_queries = fixed.choice((1, 1, 1, 2, 3, 4, 7, 16))
    heads, dtype = fixed.choice(HEADS), fixed.choice(DTYPES)
    draw = random.Random(seed)
    if ranges:
        features.append(draw.choice(RANGES))
    for feature in draw.sample(SHAPING, k=draw.randint(0, 4)):
        if (ranges or feature not in RANGES) and all(together(feature, other) for other in features):
            features.append(feature)
    num_keys = draw.choice((1, 2, 16, 31, 33, 64, 65, 127, 128, 129, 192, 255, 257, 300, 500, 1000, 2049, 4111))
    if draw.random() < 0.9:
        num_keys = max(num_keys, num_queries)  # else the first queries see none, if causal
    return features, build(
        features, num_queries, num_keys, batch_size=draw.choice((1, 2, 3, 9)), heads=heads, head_dim=head_dim,
        dtype=dtype, device="cuda", seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("block", range(48))
def test_random_calls(block, poisoned_empty):
    """25 seeded calls a block, 1,200 in all: any dtype, head_dim, ratio, features and lengths."""
    for seed in range(25 * block, 25 * block + 25):
        features, call = draw_call(seed, block)
        try:
            on_hopper(call)
        except AssertionError as error:
            shapes = list(call.query.shape), list(call.key.shape), call.query.dtype
            raise AssertionError(f"seed {seed}, {features}, {shapes}: {error}") from error


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long(head_dim):
    """Many blocks a chunk, so that every stage is used again and again."""
    for features in (("causal",), ("causal", "left-padding", "holes")):
        for num_queries in (1, 5):
            on_hopper(build(features, num_queries, 40_000, heads=(8, 2), head_dim=head_dim, device="cuda"))


def test_negative_controls():
    call = build(("causal", "window"), 4, 300, head_dim=64, dtype=torch.bfloat16, device="cuda")
    on_hopper(call)
    for changed in ({"scale": 1.5 / 8}, {"window": 6}, {"window": 8}):
        with pytest.raises(AssertionError):
            assert_right(call.run(**changed), call)
    with pytest.raises(AssertionError):
        assert_right(call._replace(key=call.key.flip(1)).run(), call)


def test_nan_is_not_hidden():
    """What is visible and NaN comes out as NaN, in the rows that see it and in no other head."""
    for where in ("query", "key", "value"):
        call = build((), 1, 1000, heads=(8, 2), head_dim=128, dtype=torch.bfloat16, device="cuda")
        getattr(call, where)[0, 0, 0, 5] = float("nan")
        out = call.run()
        assert out[0, 0].isnan().any(), where
        assert not out[1].isnan().any() and not out[0, 4:].isnan().any()


@pytest.mark.parametrize("block", range(16))
def test_random_fp8_calls(block):
    """12 seeded calls a block in e4m3, 192 in all, beside PyTorch on what they mean; NaN where unfilled."""
    fixed = random.Random(block)
    heads, dtype = fixed.choice(((4, 2), (8, 1), (8, 8), (12, 4))), fixed.choice(DTYPES)
    head_dim, value_dim = fixed.choice(((64, 64), (128, 128), (128, 128), (96, 96), (192, 128), (256, 256)))
    softcap, ranged = fixed.choice((None, None, 8.0)), fixed.random() < 0.6
    num_queries = fixed.choice((1, 1, 2, 4, 16))
    for seed in range(12 * block, 12 * block + 12):
        draw = random.Random(seed)
        num_keys = draw.choice((16, 31, 64, 65, 129, 192, 300, 1000, 2049, 4111))
        query, key, value, scales = test_fp8.call(
            num_queries, num_keys, dtype, "cuda", heads=heads, head_dim=head_dim, value_dim=value_dim, seed=seed
        )
        arguments = {"is_causal": True, "softcap": softcap}
        if ranged:
            filled = draw.randint(num_queries, num_keys)
            first = torch.tensor([0, draw.randint(0, filled - num_queries)], device="cuda")
            arguments = {"softcap": softcap, "key_range": make_key_range(
                2, num_keys, first=first, end=filled, query_start=filled - num_queries, right=0,
                left=draw.choice((-1, -1, 77)),
            )}  # fmt: skip
            for part in (key, value):
                part[:, :, filled:] = torch.tensor(torch.nan, device="cuda").to(part.dtype)
                part[1, :, : first[1]] = torch.tensor(torch.nan, device="cuda").to(part.dtype)
        path_counts.clear()
        got = attention(query, key, value, **scales, **arguments)
        assert set(path_counts) == {"flashcore_hopper_decode"} and not got.isnan().any()
        if ranged:
            for part in (key, value):  # the peer multiplies what it does not see
                part.copy_(part.float().nan_to_num().to(part.dtype))
        test_fp8.check(query, key, value, scales, **arguments)


REPEATED = {
    "one token": ((), 128, 1, 2048, (32, 8)),
    "padded": (("left-padding", "causal"), 128, 1, 3000, (32, 8)),
    "4 tokens": (("causal",), 128, 4, 1777, (32, 8)),
    "head_dim 64": (("causal", "sinks"), 64, 1, 2048, (8, 8)),
    "head_dim 256": (("softcap",), 256, 1, 999, (16, 8)),
    "multi-query": ((), 128, 1, 8192, (8, 1)),
}


@pytest.mark.parametrize("name", REPEATED)
def test_repeats(name):
    features, head_dim, num_queries, num_keys, heads = REPEATED[name]
    call = build(
        features, num_queries, num_keys, batch_size=4, heads=heads, head_dim=head_dim, dtype=torch.bfloat16,
        device="cuda",
    )  # fmt: skip
    first = on_hopper(call)
    for _ in range(1000):
        assert torch.equal(call.run(), first)


def batched_and_alone(batch_size: int, softcap, window, head_dim: int):
    """The answers to a left-padded and partly unfilled batch, and to each of its sequences."""
    call = build((), 1, 1500, batch_size=batch_size, heads=(8, 2), head_dim=head_dim, dtype=torch.bfloat16,
                 device="cuda")  # fmt: skip
    first = torch.arange(batch_size, device="cuda") * 97 % 1100
    end = 1500 - torch.arange(batch_size, device="cuda") * 31 % 200
    left = -1 if window is None else window - 1
    padded = make_key_range(batch_size, 1500, first=first, end=end, query_start=end - 1, left=left, right=0)
    batched = attention(call.query, call.key, call.value, key_range=padded, softcap=softcap)
    alone = [
        attention(
            call.query[b : b + 1], call.key[b : b + 1, :, lo:hi], call.value[b : b + 1, :, lo:hi], is_causal=True,
            window=window, softcap=softcap,
        )
        for b, (lo, hi) in enumerate(zip(first.tolist(), end.tolist()))
    ]  # fmt: skip
    return batched, torch.cat(alone)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_alone_batched_and_padded(head_dim, softcap, window):
    path_counts.clear()
    for batch_size in (2, 7, 16, 64):
        batched, alone = batched_and_alone(batch_size, softcap, window, head_dim)
        assert torch.equal(batched, alone), batch_size
    assert set(path_counts) == {"flashcore_hopper_decode"}


@pytest.mark.parametrize("num_queries", [1, 4])
@pytest.mark.parametrize("batch_size", [16, 30])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_whole_sequences(head_dim, batch_size, num_queries, monkeypatch):
    """Programs that have all keys of a sequence, one or two on an SM, give the bits of those that share them."""
    planned, whole = sharing.share_out, []

    def spy(problem, config):
        whole.append(planned(problem, config).whole_sequences)
        return planned(problem, config)

    monkeypatch.setattr(decode_launch, "share_out", spy)
    call = build((), num_queries, 1500, batch_size=batch_size, heads=(16, 8), head_dim=head_dim, dtype=torch.bfloat16,
                 device="cuda")  # fmt: skip
    for window in (None, 700):
        monkeypatch.setattr(prepared, "_calls", {})  # a window in a KeyRange is no other kind of call
        out = attention(call.query, call.key, call.value, is_causal=True, window=window)
        key_range = make_key_range(
            batch_size, 1500, query_start=1500 - num_queries, right=0, left=-1 if window is None else window - 1,
            device=torch.device("cuda"),
        )  # fmt: skip
        whole.clear()
        assert torch.equal(attention(call.query, call.key, call.value, key_range=key_range), out)
        assert whole and not any(whole), "lengths that may differ are shared"
    whole.clear()
    monkeypatch.setattr(prepared, "_calls", {})
    attention(call.query, call.key, call.value, is_causal=True)
    assert whole and all(whole)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_fp8_alone_and_batched(head_dim):
    query, key, value, scales = test_fp8.call(
        1, 1300, torch.bfloat16, "cuda", heads=(4, 2), head_dim=head_dim, value_dim=head_dim
    )
    batched = attention(query, key, value, is_causal=True, **scales)
    for b in range(2):
        own = {name: scale[b : b + 1].contiguous() for name, scale in scales.items()}
        alone = attention(query[b : b + 1], key[b : b + 1], value[b : b + 1], is_causal=True, **own)
        assert torch.equal(batched[b : b + 1], alone)
        assert torch.equal(attention(query, key, value, is_causal=True, **scales), batched)


TREES = {
    "one token": dict(num_keys=5000, heads=(8, 2), head_dim=128),
    "short": dict(num_keys=700, heads=(8, 8), head_dim=64),
    "4 tokens": dict(num_keys=3000, heads=(8, 2), head_dim=128, num_queries=4),
    "head_dim 256": dict(num_keys=1900, heads=(4, 4), head_dim=256),
    "multi-query": dict(num_keys=9000, heads=(32, 1), head_dim=128),
    "multi-query, head_dim 64": dict(num_keys=30_000, heads=(8, 1), head_dim=64),
    "fp8": dict(num_keys=5000, heads=(4, 2), head_dim=128, fp8=True),
    "rows merged in groups": dict(num_keys=3000, heads=(14, 2), head_dim=128),
}


@pytest.mark.parametrize("features", ["", "window"])
@pytest.mark.parametrize("name", TREES)
def test_one_tree_however_it_is_shared_out(name, features, monkeypatch):
    """The bits are those of the tree over the chunks, whoever merges which part of it, with whatever stages."""
    options = {"num_queries": 1, "fp8": False, **TREES[name]}
    fp8, num_queries, num_keys, heads, head_dim = (
        options[key] for key in ("fp8", "num_queries", "num_keys", "heads", "head_dim")
    )
    query, key, value, scales = test_fp8.call(
        num_queries, num_keys, torch.bfloat16, "cuda", heads=heads, head_dim=head_dim, value_dim=head_dim
    )
    if not fp8:
        key, value = torch.randn(2, *key.shape, device="cuda", dtype=torch.bfloat16)
        scales = {}
    key_range = make_key_range(
        2, num_keys, first=torch.tensor([0, 333], device="cuda"), end=num_keys, query_start=num_keys - num_queries,
        right=0, left=num_keys // 2 if features == "window" else -1,
    )  # fmt: skip

    planned = sharing.share_out

    def call(each, fan_in, stages=1, in_a_row=False):
        def forced(problem, config):
            levels = each.bit_length() - 1
            return planned(problem, config)._replace(fan_in=fan_in, stages=stages, levels=levels, in_a_row=in_a_row)

        monkeypatch.setattr(decode_launch, "share_out", forced)
        monkeypatch.setattr(sharing.Sharing, "chunks_each", lambda self, chunks, tiles: each)
        monkeypatch.setattr(prepared, "_calls", {})
        path_counts.clear()
        answer = attention(query, key, value, key_range=key_range, return_lse=True, **scales)
        assert set(path_counts) == {"flashcore_hopper_decode"}
        return answer

    out, lse = call(1, 16)
    for shared in ((2, 16), (4, 16), (8, 16), (1, 4), (1, 8), (4, 4), (2, 8), (4, 8, 2), (1, 4, 1, True)):
        other_out, other_lse = call(*shared)
        assert torch.equal(other_out, out) and torch.equal(other_lse, lse), shared
    monkeypatch.setattr(table, "ROWS", [row._replace(min_chunk=192, chunks=8) for row in table.ROWS])
    other_out, other_lse = call(1, 16)
    torch.testing.assert_close(other_lse, lse, atol=1e-4, rtol=1e-4)
    assert not torch.equal(other_out, out) or not torch.equal(other_lse, lse), "other chunks are another tree"


@pytest.fixture
def own_mailboxes(monkeypatch):
    """Mailboxes that no other test has used."""
    own = workspace.Words(workspace.UNWRITTEN, pool=1 << 22, least=1 << 12, most=1 << 24)
    monkeypatch.setattr(workspace, "_mailboxes", own)
    return own


@pytest.mark.parametrize("name", REPEATED)
def test_mailboxes_are_unwritten_behind_a_call(name, own_mailboxes):
    """Else the next call of that stream would take this one's sums for its own, as the control does."""
    features, head_dim, num_queries, num_keys, heads = REPEATED[name]
    call = build(features, num_queries, num_keys, heads=heads, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    want = on_hopper(call)
    (buffer,) = own_mailboxes._buffers.values()
    torch.cuda.synchronize()
    assert (buffer == workspace.UNWRITTEN).all()
    buffer.fill_(0)
    assert not torch.equal(call.run(), want)
    own_mailboxes.forget(call.query.device)
    assert torch.equal(call.run(), want)


def test_a_nan_with_the_bits_of_an_unwritten_mailbox():
    for where in ("query", "key", "value"):
        call = build((), 1, 3000, heads=(8, 2), head_dim=128, dtype=torch.bfloat16, device="cuda")
        getattr(call, where)[0].view(torch.int16).fill_(-1)
        out = call.run()
        assert out[0].isnan().all() and not out[1].isnan().any(), where


def test_streams_and_graphs_at_once():
    """Programs that wait for others never keep them from starting, whatever else the GPU does."""
    shapes = ((1, 1, 2048, (32, 8)), (1, 4, 2048, (32, 8)), (4, 1, 4096, (28, 4)), (2, 1, 9000, (32, 1)))
    calls = [
        build((), num_queries, num_keys, batch_size=batch_size, heads=heads, head_dim=128, dtype=torch.bfloat16,
              device="cuda")
        for batch_size, num_queries, num_keys, heads in shapes
    ]  # fmt: skip
    want = [call.run() for call in calls]
    captured = []
    for call in calls:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [call.run() for _ in range(5)]
        captured.append((graph, outputs))
    streams = [torch.cuda.Stream() for _ in range(9)]
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, (graph, outputs) in zip(streams, captured):
            with torch.cuda.stream(stream):
                for output in outputs:
                    output.fill_(float("nan"))
                graph.replay()
        eager = []
        for stream, call in zip(streams[4:], calls):
            with torch.cuda.stream(stream):
                eager.append([call.run() for _ in range(4)])
        with torch.cuda.stream(streams[8]):
            matrix @ matrix
        torch.cuda.synchronize()
        for expected, answers, (_, outputs) in zip(want, eager, captured):
            assert all(torch.equal(answer, expected) for answer in (*answers, *outputs))


def test_inverse_chunks_that_depend_on_the_batch(monkeypatch):
    """The test above would see other chunks for a batch than for a sequence."""
    batched, alone = batched_and_alone(7, None, None, 128)
    assert torch.equal(batched, alone)
    monkeypatch.setattr(table, "ROWS", [row._replace(min_chunk=512) for row in table.ROWS])
    monkeypatch.setattr(prepared, "_calls", {})
    other, _ = batched_and_alone(7, None, None, 128)
    torch.testing.assert_close(other, batched, atol=1e-2, rtol=1e-2)
    assert not torch.equal(other, batched)

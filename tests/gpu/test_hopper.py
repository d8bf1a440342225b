"""The Gluon kernel against float64 by the error rule: features, head dimensions, seeded random calls; and its bits."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flashcore_kernels import attention, explain, make_key_range, path_counts
from flashcore_kernels.runtime import workspace

from ..kernels.reference import RANGES, assert_right, build, check, together

if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("the Gluon kernel is for compute capability 9.0", allow_module_level=True)

FEATURES = ("causal", "window", "softcap", "sinks", *RANGES, "rows", "gqa-7to1", "mqa", "lse", "strides")
SHAPING = ("causal", "window", *RANGES, "rows", "gqa-7to1", "mqa", "strides")  # cost no compilation, but for the range
HEAD_DIMS = (64, 96, 128, 192, 256)
DTYPES = (torch.float16, torch.bfloat16)


PREFILL = {"flashcore_hopper", "flashcore_hopper_short"}


def on_hopper(call):
    """Check `call`, and that it was a Gluon kernel's."""
    path_counts.clear()
    out = check(call)
    assert path_counts and set(path_counts) <= PREFILL, explain(call.query, call.key, call.value)
    return out


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_features(head_dim, feature):
    for features in ((feature,), (feature, "causal"), (feature, "window", "left-padding")):
        if all(together(feature, other) for other in features[1:]):
            for num_queries, num_keys in ((17, 129), (129, 129), (300, 700), (64, 64)):
                dtype = torch.bfloat16
                on_hopper(build(features, num_queries, num_keys, head_dim=head_dim, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 40, 72, 80, 120, 136, 160, 200, 248])
def test_head_dims(head_dim, dtype):
    """Whatever is a multiple of 8; the values' own where it stays one."""
    for features in (("causal", "lse"), ("causal", "value-dim") if head_dim % 16 == 8 else ("causal",)):
        on_hopper(build(features, 200, 333, head_dim=head_dim, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("features", [("causal",), ("left-padding", "causal"), ("rows",), ("lse",)], ids="+".join)
def test_mla(features):
    call = build(features, 300, 300, heads=(8, 8), head_dim=192, dtype=torch.bfloat16, device="cuda")
    value = call.value[..., :128].contiguous()
    on_hopper(call._replace(value=value))
    on_hopper(call._replace(value=call.value[..., 64:]))


def draw_call(seed: int, block: int):
    """What chooses a compiled kernel is the block's, but for the KeyRange; the rest is the seed's."""
    split = HEAD_DIMS[block % 5]
    flags = ("softcap", "sinks", "lse") if block // 5 % 2 else ()
    dtype = DTYPES[block // 10 % 2]
    draw = random.Random(seed)
    head_dim = draw.choice((split, split, split - 8, split - 24))
    features = list(flags)
    for feature in draw.sample(SHAPING, k=draw.randint(0, 5)):
        if all(together(feature, other) for other in features):
            features.append(feature)
    num_queries = draw.choice((17, 63, 64, 65, 127, 128, 129, 191, 192, 193, 300, 500, 1000))
    num_keys = num_queries + draw.choice((0, 0, 0, 1, 13, 64, 128, 129, 1000, 4000))
    if draw.random() < 0.1 and "rows" not in features:
        num_keys = draw.choice((1, 16, 65, 130))  # fewer keys than queries: the first queries see none, if causal
    # A small call has many heads and sequences, so that programs get several tiles; a large one would only take time.
    few = num_queries * num_keys > 300_000
    return features, build(
        features, num_queries, num_keys, batch_size=draw.choice((1, 2) if few else (1, 3, 9)),
        heads=draw.choice(((4, 2), (8, 1), (3, 3)) if few else ((1, 1), (8, 2), (12, 4), (14, 2), (32, 8))),
        head_dim=head_dim, dtype=dtype, device="cuda", seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("block", range(50))
def test_random_calls(block, poisoned_empty):
    """40 seeded calls a block, 2,000 in all: any dtype, head_dim, ratio, features and lengths."""
    for seed in range(40 * block, 40 * block + 40):
        features, call = draw_call(seed, block)
        try:
            on_hopper(call)
        except AssertionError as error:
            shapes = list(call.query.shape), list(call.key.shape), call.query.dtype
            raise AssertionError(f"seed {seed}, {features}, {shapes}: {error}") from error


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_long(head_dim):
    """Many blocks a tile, many tiles a program."""
    for features in (("causal",), (), ("causal", "left-padding")):
        on_hopper(build(features, 2111, 2111, batch_size=2, heads=(32, 8), head_dim=head_dim, device="cuda"))


@pytest.mark.parametrize("features", [("window", "causal"), ("lse",), ("sinks", "causal"), ("gqa-7to1",), ("strides",)])
def test_many_queries(features):
    """head_dim 64 has three consumers from 2,048 queries on."""
    for head_dim in (64, 40):
        on_hopper(build(features, 2050, 2300, head_dim=head_dim, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_growing_scores(head_dim):
    """Rows whose maximum leaps, creeps and stays, side by side in a warp: sums so far are rescaled where it leaps."""
    for features in (("causal",), (), ("causal", "sinks")):
        call = build(features, 300, 1500, heads=(4, 2), head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
        place = torch.linspace(0, 1, 1500, device="cuda")[:, None]
        generator = torch.Generator("cuda").manual_seed(head_dim)
        direction = torch.randn(head_dim, generator=generator, device="cuda")
        for height in (4, 30):
            # A part of each key that grows with its place, which queries see more or less of, or with the other sign.
            key = call.key + (place * direction * height / head_dim**0.5).to(call.key.dtype)
            strength = torch.randn(300, 1, generator=generator, device="cuda") * 2
            on_hopper(call._replace(key=key, query=call.query + (strength * direction).to(call.query.dtype)))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_softcap_far_above_all_scores(head_dim):
    """tanh is then of very small numbers, where a formula that cancels would leave little of them."""
    for num_queries in (300, 1):
        call = build(("causal",), num_queries, 300, head_dim=head_dim, dtype=torch.float16, device="cuda")
        call.arguments["softcap"] = 3e4
        check(call)


def test_negative_controls():
    call = build(("causal", "window"), 129, 300, head_dim=64, dtype=torch.bfloat16, device="cuda")
    on_hopper(call)
    for changed in ({"scale": 1.5 / 8}, {"window": 6}, {"window": 8}):
        with pytest.raises(AssertionError):
            assert_right(call.run(**changed), call)
    with pytest.raises(AssertionError):
        assert_right(call._replace(key=call.key.flip(1)).run(), call)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_counter_of_tiles(head_dim):
    """Each launch leaves it at zero, as the next one needs it, however many tiles there are.

    With more keys than the short kernel takes: that one counts nothing.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    for batch_size, num_queries in ((1, 17), (2, 1100), (9, 1100)):
        for features in ((), ("causal",), ("causal", "left-padding")):
            call = build(
                features, num_queries, 1100, batch_size=batch_size, heads=(8, 2), head_dim=head_dim,
                dtype=torch.bfloat16, device="cuda",
            )  # fmt: skip
            on_hopper(call)
            assert not workspace._counters.get(1, device).any()
    want = call.run()
    other = call._replace(value=-call.value)
    # Negative control: nobody draws the first tile behind those of the first round.
    try:
        workspace._counters.get(1, device)[0] = 1
        assert not torch.equal(other.run(), -want)
    finally:
        workspace.forget(device)
    assert torch.equal(other.run(), -want)


def many_short_tiles(head_dim: int) -> None:
    """Some thousand tiles of a block or a few, over and over: the producer is as far ahead as it ever gets."""
    for length, window in ((1024, None), (1024, 64), (700, 1), (60, None)):
        shape = (max(1, 16384 // max(length, 128)), length, 32, head_dim)
        query, key, value = (torch.randn(shape, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for _ in range(3))
        path_counts.clear()
        first = attention(query, key, value, is_causal=True, window=window)
        assert not first.isnan().any()
        for _ in range(1000):
            torch.full_like(first, float("nan"))  # what the output's memory holds before
            assert torch.equal(attention(query, key, value, is_causal=True, window=window), first)
        assert set(path_counts) == {"flashcore_hopper"}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_short_tiles(head_dim):
    """Whoever misses that the producer has gone on waits for ever: in a process of its own, which can be stopped."""
    code = f"from tests.gpu.test_hopper import many_short_tiles; many_short_tiles({head_dim})"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=120)


REPEATED = {
    "causal 128": (("causal",), 64, 513, 513, (16, 4)),
    "full 128": ((), 128, 777, 777, (16, 4)),
    "padded 128": (("causal", "left-padding"), 128, 500, 1000, (16, 4)),
    "rows 128": (("rows",), 128, 513, 513, (16, 4)),
    "window 64": (("causal", "window"), 64, 1000, 1000, (8, 8)),
    "causal 96": (("causal", "lse"), 96, 513, 513, (8, 8)),
    "causal 192": (("causal",), 192, 513, 513, (8, 8)),
    "causal 256": (("causal", "sinks"), 256, 513, 1000, (8, 2)),
    "causal 64": (("causal",), 64, 2100, 2100, (8, 8)),
    "full 64": ((), 64, 1100, 1100, (8, 8)),
    "one copy 64": (("causal", "sinks"), 64, 1025, 1500, (8, 8)),
}


@pytest.mark.parametrize("name", REPEATED)
def test_repeats(name):
    features, head_dim, num_queries, num_keys, heads = REPEATED[name]
    call = build(
        features, num_queries, num_keys, batch_size=4, heads=heads, head_dim=head_dim, dtype=torch.bfloat16,
        device="cuda",
    )  # fmt: skip
    call.arguments.pop("return_lse", None)
    first = on_hopper(call)
    for _ in range(1000):
        assert torch.equal(call.run(), first)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_alone_batched_and_padded(head_dim, softcap, window):
    """Each sequence of a left-padded batch gives the bits that it gives alone."""
    call = build((), 700, 1000, batch_size=4, heads=(8, 2), head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    first = torch.tensor([0, 3, 77, 429], device="cuda")
    left = -1 if window is None else window - 1
    padded = make_key_range(4, 1000, first=first, query_start=300, left=left, right=0)
    path_counts.clear()
    batched = attention(call.query, call.key, call.value, key_range=padded, softcap=softcap)
    for b, start in enumerate(first.tolist()):
        real = min(700, 1000 - start)
        query = call.query[b : b + 1, :, 700 - real :]
        key, value = call.key[b : b + 1, :, start:], call.value[b : b + 1, :, start:]
        alone = attention(query, key, value, is_causal=True, window=window, softcap=softcap)
        assert torch.equal(batched[b : b + 1, :, 700 - real :], alone), start
    assert set(path_counts) == {"flashcore_hopper"}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_same_bits_by_all_rows(head_dim, causal):
    """Many queries, few, and a key range that hides nothing take different rows of the table: the same bits."""
    call = build((), 2100, 2100, batch_size=2, heads=(8, 2), head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    query, key, value = call.query, call.key, call.value
    path_counts.clear()
    many = attention(query, key, value, is_causal=causal)
    few = attention(query[:, :, 1400:], key, value, is_causal=causal)
    everything = make_key_range(2, 2100, right=0 if causal else -1, device="cuda")
    ranged = attention(query, key, value, key_range=everything)
    assert set(path_counts) == {"flashcore_hopper"}
    assert torch.equal(many[:, :, 1400:], few)
    assert torch.equal(many, ranged)
    assert not torch.equal(many, attention(query, key.roll(1, dims=2), value, is_causal=causal))

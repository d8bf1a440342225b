"""The portable kernels, compiled, against float64 by the error rule: features alone and in pairs, random calls."""

import random

import pytest
import torch
from flashcore_kernels import attention, make_key_range, op, path_counts, run
from flashcore_kernels.runtime import prepared

from ..kernels.reference import DTYPES, FEATURES, PAIRS, assert_right, build, check, together

HEAD_DIMS = (8, 16, 40, 64, 80, 96, 128, 192, 256)


@pytest.fixture(autouse=True)
def portable(monkeypatch):
    """The kernels of every GPU, on Hopper too: its own are in test_hopper.py."""
    here = op.device_of(torch.device("cuda", torch.cuda.current_device()))
    for module in (op, run):
        monkeypatch.setattr(module, "device_of", lambda device: here._replace(triton=(0, 0)))
    monkeypatch.setattr(prepared, "_calls", {})  # of the kernels that would serve here without this
    path_counts.clear()
    yield
    assert not any("hopper" in path for path in path_counts)


@pytest.mark.parametrize(
    ("features", "dtype"),
    [((feature,), dtype) for feature in FEATURES for dtype in ("fp16", "fp32")] + [(pair, "bf16") for pair in PAIRS],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_features(features, dtype):
    for num_queries, num_keys in ((1, 129), (5, 700), (129, 129), (127, 300)):
        check(build(features, num_queries, num_keys, head_dim=64, dtype=DTYPES[dtype], device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, dtype):
    for num_queries, num_keys in ((1, 1000), (17, 333), (300, 300)):
        check(build(("causal", "lse"), num_queries, num_keys, head_dim=head_dim, dtype=DTYPES[dtype], device="cuda"))


def random_features(draw: random.Random) -> tuple[str, ...]:
    chosen = []
    for feature in draw.sample(FEATURES, k=draw.randint(0, 4)):
        if all(together(feature, other) for other in chosen):
            chosen.append(feature)
    return tuple(chosen)


@pytest.mark.parametrize("block", range(20))
def test_random_calls(block):
    """25 seeded calls: any dtype, head_dim, ratio, features and lengths."""
    for seed in range(25 * block, 25 * block + 25):
        draw = random.Random(seed)
        features = random_features(draw)
        num_queries = draw.choice((1, 1, 2, 5, 15, 16, 17, 64, 127, 128, 129, 500))
        num_keys = num_queries + draw.choice((0, 0, 1, 13, 128, 1000, 4000))
        call = build(
            features, num_queries, num_keys, batch_size=draw.choice((1, 2, 5)),
            heads=draw.choice(((1, 1), (4, 2), (8, 1), (8, 2), (12, 4), (14, 2))), head_dim=draw.choice(HEAD_DIMS),
            dtype=draw.choice(list(DTYPES.values())), device="cuda", seed=seed,
        )  # fmt: skip
        try:
            check(call)
        except AssertionError as error:
            shapes = list(call.query.shape), list(call.key.shape), call.query.dtype
            raise AssertionError(f"seed {seed}, {features}, {shapes}: {error}") from error


@pytest.mark.parametrize("num_queries", [1, 129])
def test_negative_controls(num_queries):
    call = build(("causal", "window"), num_queries, 300, head_dim=64, dtype=torch.bfloat16, device="cuda")
    check(call)
    for changed in ({"scale": 1.5 / 8}, {"window": 6}, {"window": 8}):
        with pytest.raises(AssertionError):
            assert_right(call.run(**changed), call)
    with pytest.raises(AssertionError):
        assert_right(call._replace(key=call.key.flip(1)).run(), call)
    padded = build(("causal", "left-padding"), num_queries, 300, head_dim=64, device="cuda")
    clean = padded._replace(key=padded.key.nan_to_num(), value=padded.value.nan_to_num())
    with pytest.raises(AssertionError):
        assert_right(attention(clean.query, clean.key, clean.value, is_causal=True), padded)


@pytest.mark.parametrize("num_queries", [1, 64])
def test_tensors_over_2_31_elements(num_queries):
    """The last sequence and head of a key tensor of 2.3e9 elements, 4.6 GB."""
    num_heads, num_keys, dim = 8, 70_000, 128
    batch_size = 32
    key = torch.empty(batch_size, num_heads, num_keys, dim, dtype=torch.bfloat16, device="cuda").normal_()
    assert key.numel() > 2**31
    query = torch.randn(batch_size, num_heads, num_queries, dim, dtype=torch.bfloat16, device="cuda")
    path_counts.clear()
    out = attention(query, key, key, is_causal=True)
    assert path_counts["torch"] == 0
    for b, h in ((0, 0), (15, 3), (31, 7)):
        one = query[b : b + 1, h : h + 1], key[b : b + 1, h : h + 1]
        want = torch.nn.functional.scaled_dot_product_attention(
            one[0].float(), one[1].float(), one[1].float(),
            attn_mask=torch.ones(num_queries, num_keys, dtype=torch.bool, device="cuda").tril(num_keys - num_queries),
        )  # fmt: skip
        torch.testing.assert_close(out[b : b + 1, h : h + 1].float(), want, atol=2e-3, rtol=2e-2)


def test_a_long_dense_mask_row_stride():
    """A bool mask of 2.1e9 elements: its offsets do not fit in 32 bits."""
    length = 46_400
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="cuda").tril_()
    assert mask.numel() > 2**31
    query = torch.randn(1, 1, length, 16, dtype=torch.float16, device="cuda")
    got = attention(query, query, query, mask=mask)
    want = attention(query, query, query, is_causal=True)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)


def test_opcheck_on_the_gpu():
    call = build((), 5, 129, dtype=torch.bfloat16, device="cuda")
    key_range = make_key_range(2, 129, query_start=124, right=0, device="cuda")
    arguments = (call.query, call.key, call.value, key_range, None, None, -1, -1, 0.125, 0.0, True)
    torch.library.opcheck(torch.ops.flashcore.attention.default, arguments)


@pytest.mark.parametrize("num_queries", [16, 64])
@pytest.mark.parametrize("head_dim, value_dim", [(36, 20), (40, 24), (56, 28), (88, 20), (24, 28), (100, 24)])
def test_rows_that_no_vector_load_fits(head_dim, value_dim, num_queries):
    """ptxas 12.8 made wrong machine code of these: see `value_columns`. On wgmma, so 16 queries x group 3."""
    call = build((), num_queries, 144, heads=(12, 4), head_dim=head_dim, device="cuda")
    value = torch.randn(*call.value.shape[:3], value_dim, device="cuda").half()
    check(call._replace(value=value))


@pytest.mark.parametrize("head_dim", [40, 64, 80, 96, 128, 192, 256])
def test_same_bits_alone_and_padded(head_dim):
    """Though a key range may have tiles of its own, and rows that no vector load fits are not cut into two tiles."""
    call = build((), 300, 300, heads=(4, 2), head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    first = torch.tensor([0, 77], device="cuda")
    padded = attention(
        call.query, call.key, call.value, key_range=make_key_range(2, 300, first=first, right=0, device="cuda")
    )
    own = [tensor[1:, :, 77:] for tensor in (call.query, call.key, call.value)]
    shifted = [torch.nn.functional.pad(tensor, (1, 0))[..., 1:] for tensor in own]
    for alone in (own, shifted):
        assert torch.equal(attention(*alone, is_causal=True), padded[1:, :, 77:])
    keys = [torch.cat([tensor[:, :, :1] * 0, tensor], dim=2) for tensor in own[1:]]
    hidden = torch.ones(1, 1, 1, 224, dtype=torch.bool, device="cuda")
    hidden[..., 0] = False
    moved = attention(own[0], *keys, is_causal=True, mask=hidden)
    assert not torch.equal(moved, padded[1:, :, 77:]), "blocks that begin elsewhere would have shown"

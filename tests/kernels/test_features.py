"""Every feature alone and in pairs, over odd lengths, by both kernels; NaN wherever nobody looks."""

import pytest
import torch
import triton
import triton.language as tl
from flashcore_kernels import attention, make_key_range, path_counts
from flashcore_kernels.portable.blocks import tanh

from .reference import DTYPES, FEATURES, PAIRS, assert_right, build, check

LENGTHS = (1, 5, 17, 127, 129)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def kernel_of(features, num_queries) -> str:
    return "flashcore_forward" if "rows" in features or num_queries > 16 else "flashcore_decode"


def checked(features, num_queries, num_keys, device, **options):
    """Check one call, and that the kernel served it and not the fallback."""
    call = build(features, num_queries, num_keys, device=device, **options)
    path_counts.clear()
    check(call)
    assert dict(path_counts) == {kernel_of(features, num_queries): 1}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("feature", ["plain", *FEATURES])
def test_alone(feature, length, device):
    checked({feature} - {"plain"}, length, length, device, seed=length)


@pytest.mark.parametrize("feature", ["plain", *FEATURES])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_alone_in_other_dtypes(feature, dtype, device):
    for num_queries, num_keys in ((5, 129), (17, 127)):
        checked({feature} - {"plain"}, num_queries, num_keys, device, dtype=DTYPES[dtype])


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pair_decode(pair, device):
    place = PAIRS.index(pair)
    checked(set(pair), (1, 5)[place % 2], (129, 127, 17)[place % 3], device, seed=place)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pair_forward(pair, device):
    place = PAIRS.index(pair)
    checked(set(pair), (17, 127)[place % 2], (129, 127)[place // 2 % 2], device, heads=(2, 1), seed=place)


def test_tanh():
    """Relative errors, so that a softcap far above all scores leaves these as they are."""
    x = torch.cat([torch.logspace(-30, 1.5, 5000), torch.tensor([0.0, 40.0])])
    x = torch.cat([x, -x])
    for exact, most in ((True, 4e-7), (False, 4e-6)):
        got = torch.empty_like(x)
        _tanh_kernel[(1,)](x, got, len(x), exact, 16384)
        want = x.double().tanh()
        assert ((got - want).abs() <= most * want.abs()).all()
        assert ((got - want).abs() > most / 100 * want.abs()).any(), "negative control"
    no_series = 1.0 - 2.0 / (1.0 + torch.exp2(2.8853900817779268 * x))
    assert ((no_series - x.double().tanh()).abs() > 4e-6 * x.double().tanh().abs()).any()


@triton.jit
def _tanh_kernel(X, Out, count, EXACT: tl.constexpr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x = tl.load(X + offs, mask=offs < count, other=0.0)
    tl.store(Out + offs, tanh(x, EXACT), mask=offs < count)


@pytest.mark.parametrize("num_queries", [3, 40])
def test_everything_together(num_queries, device):
    everything = set(FEATURES) - {"rows", "bool-mask", "mqa"}
    checked(everything, num_queries, 127, device, head_dim=40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("num_queries", [1, 33])
def test_head_dim(head_dim, num_queries, dtype, device):
    checked({"causal"}, num_queries, 65, device, head_dim=head_dim, dtype=DTYPES[dtype], heads=(2, 1))


@pytest.mark.parametrize("dtype, head_dim", [("fp16", 257), ("fp16", 288), ("bf16", 320), ("fp16", 512), ("fp32", 512)])
@pytest.mark.parametrize("num_queries", [1, 33])
@pytest.mark.parametrize("features", [("causal",), ("left-padding", "bool-mask", "softcap", "sinks", "lse")])
def test_head_dim_above_256(features, num_queries, dtype, head_dim, device):
    path_counts.clear()
    checked(set(features), num_queries, 65, device, head_dim=head_dim, dtype=DTYPES[dtype], heads=(2, 1))
    assert "torch" not in path_counts


@pytest.mark.parametrize("head_dims", [(192, 128), (64, 256), (40, 16), (8, 24), (320, 64), (64, 512)], ids=str)
@pytest.mark.parametrize("num_queries", [1, 33])
def test_value_dim_of_its_own(head_dims, num_queries, device):
    call = build({"causal"}, num_queries, 65, head_dim=head_dims[0], heads=(2, 1), device=device)
    value = torch.randn(2, 1, 65, head_dims[1], dtype=torch.float16, device=device)
    check(call._replace(value=value))


@pytest.mark.parametrize("head_dim", [1, 3, 8])
@pytest.mark.parametrize("num_queries", [1, 33])
def test_small_head_dim(head_dim, num_queries, device):
    checked({"causal"}, num_queries, 33, device, head_dim=head_dim)


@pytest.mark.filterwarnings("ignore::flashcore_kernels.FlashcoreFallbackWarning")
@pytest.mark.parametrize("head_dim", [513, 576])
def test_large_head_dim_goes_through_pytorch(head_dim, device):
    call = build({"causal", "left-padding"}, 17, 33, head_dim=head_dim, device=device, dtype=torch.float32)
    path_counts.clear()
    check(call)
    assert path_counts["torch"] == 1


@pytest.mark.parametrize("ratio", [(1, 1), (6, 3), (16, 1), (33, 1)], ids=lambda heads: f"{heads[0]}to{heads[1]}")
@pytest.mark.parametrize("num_queries", [1, 6, 16])
def test_decode_tiles(ratio, num_queries, device):
    """Up to 16 tokens of a group up to 33: more rows than a tile holds, and tiles that end inside a group."""
    checked({"causal", "left-padding"}, num_queries, 65, device, heads=ratio)


@pytest.mark.parametrize("scale", [0.02, 1.0, -0.5, 0.0])
@pytest.mark.parametrize("num_queries", [1, 33])
def test_scale(scale, num_queries, device):
    call = build({"causal"}, num_queries, 65, device=device)
    call.arguments["scale"] = scale
    check(call)


@pytest.mark.parametrize("magnitude", [2.0**10, 2.0**40, 2.0**66])
@pytest.mark.parametrize("num_queries", [1, 33])
def test_scores_without_measure(num_queries, magnitude, device):
    """fp32 scores whose rounding alone is larger than exp2's range: the largest takes it all."""
    generator = torch.Generator().manual_seed(0)
    # 12 bits times 7 bits: each score is exact, and not one of their products with scale * log2(e) is.
    factor = torch.randint(2048, 4096, (2, 4, num_queries), generator=generator) / 2048 * magnitude
    query, key = torch.zeros(2, 4, num_queries, 16), torch.zeros(2, 2, 70, 16)
    query[..., 3] = factor
    key[..., 3] = torch.stack([torch.randperm(70, generator=generator) for _ in range(4)]).view(2, 2, 70)
    value = torch.randn(2, 2, 70, 16, generator=generator)
    largest = key[..., 3].argmax(-1)[..., None, None].expand(2, 2, 1, 16)
    want = value.gather(2, largest).repeat_interleave(2, 1).expand(2, 4, num_queries, 16)
    out = attention(query.to(device), key.to(device), value.to(device), scale=0.3)
    torch.testing.assert_close(out.cpu(), want, atol=1e-5, rtol=0)
    # The control: what one fma leaves of the largest score less its own rounded product, which is to be 0.
    unit = torch.tensor(0.3 * 1.4426950408889634)
    left = (factor * 69).double() * unit.double() - (factor * 69 * unit).double()
    assert (left.abs() > 128).any() == (magnitude > 2.0**31)


@pytest.mark.parametrize("window", [1, 3, (0, 0), (4, 0), (0, 4), (3, 5), (-1, 2), (2, -1), (10**6, 10**6)], ids=str)
@pytest.mark.parametrize("num_queries", [1, 33])
def test_window_sides(window, num_queries, device):
    call = build((), num_queries, 65, device=device)
    call.arguments["window"] = window
    check(call)


@pytest.mark.parametrize("far", [2**29, 2**31 - 1, 2**31, 2**40])
@pytest.mark.parametrize("num_queries", [1, 33])
def test_a_window_wider_than_int32(num_queries, far, device, checked_sums):
    """A slot plus 2**31 - 1 once overflowed, and hid keys that stand well within the window."""
    call = build((), num_queries, 65, device=device)
    want = call.run()
    assert torch.equal(call.run(window=far), want) and torch.equal(call.run(window=(far, far)), want)
    key_range = make_key_range(2, 65, query_start=65 - num_queries, left=far, right=far).to(device)
    assert torch.equal(call.run(key_range=key_range), want)


# Negative controls: each of these mistakes must break the rule that the tests above hold their outputs against.


def mistaken(call, **changed) -> None:
    with pytest.raises(AssertionError, match="error"):
        assert_right(call.run(**changed), call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 33])
class TestNegativeControls:
    def test_scale_one_and_a_half_times(self, num_queries, dtype, device):
        call = build({"causal"}, num_queries, 65, device=device, dtype=DTYPES[dtype])
        mistaken(call, scale=1.5 * 32**-0.5)

    def test_padding_ignored(self, num_queries, dtype, device):
        call = build({"left-padding"}, num_queries, 65, device=device, dtype=DTYPES[dtype])
        call = call._replace(key=call.key.nan_to_num(), value=call.value.nan_to_num())
        mistaken(call, key_range=None)

    def test_window_off_by_one(self, num_queries, dtype, device):
        call = build({"causal", "window"}, num_queries, 65, device=device, dtype=DTYPES[dtype])
        call = call._replace(key=call.key.nan_to_num(), value=call.value.nan_to_num(nan=1.0))
        mistaken(call, window=call.arguments["window"] + 1)
        mistaken(call, window=call.arguments["window"] - 1)

    def test_heads_permuted(self, num_queries, dtype, device):
        call = build({"causal"}, num_queries, 65, device=device, dtype=DTYPES[dtype])
        permuted = call._replace(key=call.key.flip(1), value=call.value.flip(1)).run()
        with pytest.raises(AssertionError, match="error"):
            assert_right(permuted, call)

    def test_causal_off_by_one(self, num_queries, dtype, device):
        call = build({"causal"}, num_queries, 65, device=device, dtype=DTYPES[dtype])
        with pytest.raises(AssertionError, match="error"):
            assert_right(call._replace(key=call.key[:, :, :-1], value=call.value[:, :, :-1]).run(), call)

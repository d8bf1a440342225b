"""Keys and values in e4m3: the kernels' error beside that of PyTorch on the same values, dequantised beforehand."""

import pytest
import torch
from flashcore_kernels import attention, make_key_range, naive_attention, path_counts
from flashcore_kernels.choose import choose
from flashcore_kernels.device import Device
from flashcore_kernels.op import explain
from flashcore_kernels.problem import Inputs, check_problem

E4M3 = torch.float8_e4m3fn


def quantized(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 and the scale of each head, any scale that uses the range."""
    scale = states.abs().amax(dim=(2, 3)).float() / 300.0
    return (states / scale[:, :, None, None]).to(E4M3), scale


def call(num_queries: int, num_keys: int, dtype, device, *, heads=(4, 2), head_dim=64, value_dim=64, seed=0):
    """(query, key, value, {"key_scale", "value_scale"}), the heads' sizes a factor of 100 apart."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    sizes = torch.tensor([0.3, 30.0], device=device).repeat(heads[1])[: heads[1], None, None]
    query = randn(2, heads[0], num_queries, head_dim).to(dtype)
    key, key_scale = quantized(randn(2, heads[1], num_keys, head_dim) * sizes.sqrt())
    value, value_scale = quantized(randn(2, heads[1], num_keys, value_dim) * sizes)
    return query, key, value, {"key_scale": key_scale, "value_scale": value_scale}


def check(query, key, value, scales, **arguments) -> None:
    got = attention(query, key, value, **scales, **arguments)
    exact = naive_attention(query.double(), key, value, **scales, **arguments)[0]
    peer = naive_attention(query, key, value, **scales, probability_dtype=query.dtype, **arguments)[0]
    assert got.dtype == query.dtype and not got.isnan().any()
    head = exact.abs().amax(dim=(2, 3), keepdim=True)  # heads of other sizes hide no errors
    error, allowed = ((got - exact) / head).abs().max(), ((peer - exact) / head).abs().max()
    assert error <= 2 * allowed + 2 * torch.finfo(query.dtype).eps, (error, allowed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_queries", [1, 4, 33])
def test_beside_dequantised(num_queries, dtype, device):
    query, key, value, scales = call(num_queries, 170, dtype, device)
    path_counts.clear()
    check(query, key, value, scales, is_causal=True)
    first = torch.tensor([0, 21], device=device)
    check(
        query, key, value, scales, key_range=make_key_range(2, 170, first=first, query_start=170 - num_queries, right=0)
    )
    assert path_counts["torch"] == 0 and path_counts.total() == 2


@pytest.mark.parametrize("num_queries", [1, 20])
def test_features(num_queries, device):
    """Window, softcap, sinks, a scale below 0, heads of 40 and 24, lse, holes, a mask."""
    query, key, value, scales = call(num_queries, 90, torch.float16, device, heads=(6, 1), head_dim=40, value_dim=24)
    sinks = torch.randn(6, device=device)
    check(query, key, value, scales, is_causal=True, window=30, softcap=8.0, sinks=sinks, scale=-0.1)
    holes = torch.rand(2, 90, device=device) > 0.3
    holes[:, 0] = True
    check(
        query,
        key,
        value,
        scales,
        key_range=make_key_range(2, 90, query_start=90 - num_queries, right=0, key_mask=holes),
    )
    check(query, key, value, scales, mask=torch.randn(2, 1, num_queries, 90, device=device))
    lse = attention(query, key, value, **scales, is_causal=True, return_lse=True)[1]
    expected = naive_attention(query, key, value, **scales, is_causal=True)[1]
    torch.testing.assert_close(lse, expected, atol=1e-3, rtol=1e-3)


def test_a_wrong_scale_would_show(device):
    query, key, value, scales = call(1, 170, torch.float16, device)
    right = attention(query, key, value, **scales)
    for name in scales:
        wrong = attention(query, key, value, **{**scales, name: torch.ones_like(scales[name])})
        assert (wrong - right).abs().max() > 0.1 * right.abs().max()
        swapped = attention(query, key, value, **{**scales, name: scales[name].flip(1).contiguous()})
        assert (swapped - right).abs().max() > 0.1 * right.abs().max()


def test_nan_in_unfilled_slots(device):
    query, key, value, scales = call(1, 170, torch.float16, device)
    want = attention(query, key[:, :, :100], value[:, :, :100], **scales)
    for part in (key, value):
        part[:, :, 100:] = torch.tensor(torch.nan, device=device).to(E4M3)
    assert key[:, :, 100:].float().isnan().all()
    key_range = make_key_range(2, 170, end=100, query_start=99, right=0, device=device)
    torch.testing.assert_close(attention(query, key, value, **scales, key_range=key_range), want)


@pytest.mark.filterwarnings("ignore::flashcore_kernels.FlashcoreFallbackWarning")
def test_through_pytorch(device):
    """Where no kernel can serve: float64 queries, and head_dim above 256."""
    path_counts.clear()
    query, key, value, scales = call(1, 50, torch.float64, device)
    torch.testing.assert_close(attention(query, key, value, **scales), naive_attention(query, key, value, **scales)[0])
    check(*call(5, 50, torch.float16, device, head_dim=288, value_dim=288), is_causal=True)
    assert path_counts["torch"] == 2


def test_older_gpus_say_so():
    query, key, value, scales = call(1, 50, torch.float16, "cpu")
    problem = check_problem(Inputs(query, key, value, **scales))
    assert choose(problem, Device("cuda", 80)).kernel == "torch"
    assert "compute capability 8.9" in explain(query, key, value, **scales, device=Device("cuda", 80))
    assert choose(problem, Device("cuda", 90)).kernel.startswith("flashcore_")


def test_bad_input():
    query, key, value, scales = call(1, 50, torch.float16, "cpu")
    with pytest.raises(ValueError, match=r"key_scale: got None; .* float32 \[2, 2\]"):
        attention(query, key, value)
    with pytest.raises(ValueError, match="value_scale: got torch.float32"):
        attention(query, key, value, key_scale=scales["key_scale"], value_scale=torch.ones(2))
    with pytest.raises(ValueError, match="both must be float8_e4m3fn"):
        attention(query, key, value.half(), **scales)
    with pytest.raises(ValueError, match="both must be float8_e4m3fn"):
        attention(query, key.half(), value.half(), **scales)


def test_operator(device):
    query, key, value, scales = call(1, 50, torch.float16, device)
    arguments = (None, None, None, -1, 0, 0.1, 0.0, False, scales["key_scale"], scales["value_scale"])
    torch.library.opcheck(
        torch.ops.flashcore.attention.default, (query, key, value, *arguments),
        test_utils="test_faketensor",
    )  # fmt: skip

"""Dense masks: everything that broadcasts to [B, H, Q, K], finfo.min, and rows that are left without a key."""

import itertools

import pytest
import torch
from flashcore_kernels import attention, make_key_range, naive_attention
from flashcore_kernels.problem import Inputs, with_mask_in_rows

from .reference import assert_right, build, check, poison_unseen

BROADCASTS = list(itertools.product((False, True), repeat=4))

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def name(broadcast):
    return "x".join("1" if one else letter for one, letter in zip(broadcast, "BHQK"))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("broadcast", BROADCASTS, ids=name)
@pytest.mark.parametrize("num_queries", [3, 33])
def test_broadcast(num_queries, broadcast, kind, device):
    call = build((), num_queries, 65, device=device)
    shape = [1 if one else size for one, size in zip(broadcast, (2, 4, num_queries, 65))]
    generator = torch.Generator().manual_seed(BROADCASTS.index(broadcast))
    keep = torch.rand(shape, generator=generator) < 0.7
    mask = keep if kind == "bool" else torch.randn(shape, generator=generator).masked_fill(~keep, -torch.inf).half()
    call.arguments["mask"] = mask.to(device)
    check(poison_unseen(call))


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("num_queries", [3, 33])
def test_strides(num_queries, kind, layout, device):
    call = build((), num_queries, 65, device=device)
    mask = torch.randn(2, 4, num_queries, 65, generator=torch.Generator().manual_seed(3)).to(device)
    mask = mask > -0.5 if kind == "bool" else mask
    if layout == "expanded":
        mask = mask[:1, :1].expand(2, 4, -1, -1)
    elif layout == "transposed":
        mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        mask = torch.cat([mask, mask], dim=3)[..., 11:76]
    call.arguments["mask"] = mask
    check(call)


@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mask_dtype_may_differ(dtype, mask_dtype, device):
    for num_queries in (3, 33):
        call = build((), num_queries, 65, dtype=dtype, device=device)
        mask = torch.randn(1, 1, num_queries, 65, generator=torch.Generator().manual_seed(3))
        call.arguments["mask"] = mask.to(mask_dtype).to(device)
        # SDPA wants query's dtype, and would round the mask to it; our rule is the float64 reference.
        output, want = call.run(), call._replace(arguments={"mask": call.arguments["mask"].to(dtype)})
        if torch.finfo(mask_dtype).bits <= torch.finfo(dtype).bits and dtype != torch.float16:
            assert_right(output, want)
        else:
            naive, _ = naive_attention(*(t.double() for t in call[:3]), mask=call.arguments["mask"])
            assert (output.double() - naive).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_queries", [1, 33])
class TestFinfoMin:
    """Transformers masks with finfo.min: hidden beside other keys, but a row of nothing else is a softmax of equals."""

    def test_hides(self, num_queries, dtype, device):
        call = build((), num_queries, 65, dtype=dtype, device=device)
        hidden = torch.rand(2, 1, num_queries, 65, generator=torch.Generator().manual_seed(1)) < 0.4
        low = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
        call.arguments["mask"] = low.to(device)
        assert_right(call.run(), call)
        assert_right(call.run(mask=~hidden.to(device)), call)

    def test_a_row_of_it_alone_stays_finite(self, num_queries, dtype, device):
        call = build((), num_queries, 65, dtype=dtype, device=device)
        low = torch.zeros(2, 1, num_queries, 65, dtype=dtype)
        low[1, :, 0] = torch.finfo(dtype).min
        call.arguments["mask"] = low.to(device)
        output = call.run()
        assert torch.isfinite(output).all()
        if dtype != torch.float16:
            # So far below any score that all of them round to the same: the mean of the values.
            mean = call.value[1].double().mean(1).repeat_interleave(2, dim=0)
            assert (output[1, :, 0].double() - mean).abs().max() < 2 * torch.finfo(dtype).eps
        else:
            assert_right(output, call)


@pytest.mark.parametrize("num_queries", [1, 16, 33, 129])
class TestRowsWithoutAKey:
    """They give zeros and an lse of -inf, also where the whole tile or sequence has none; neighbours are unharmed."""

    def assert_empty(self, output, lse, rows):
        assert torch.isfinite(output).all()
        assert not output[rows].any() and (lse[rows] == -torch.inf).all()

    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_by_mask(self, num_queries, kind, device):
        call = build({"lse"}, num_queries, 65, device=device)
        keep = torch.rand(2, 4, num_queries, 65, generator=torch.Generator().manual_seed(1)) < 0.5
        keep[0, 1, 0] = False
        keep[1] = False
        mask = keep if kind == "bool" else torch.zeros(keep.shape).masked_fill(~keep, -torch.inf).half()
        call.arguments["mask"] = mask.to(device)
        output, lse = poison_unseen(call).run()
        assert_right(output, call, lse)
        self.assert_empty(output[0, 1], lse[0, 1], slice(0, 1))
        self.assert_empty(output, lse, 1)

    @pytest.mark.parametrize("how", ["end 0", "first beyond", "key_mask"])
    def test_sequence_without_a_key(self, num_queries, how, device):
        call = build({"lse"}, num_queries, 65, device=device)
        key_mask = None
        first, end = torch.zeros(2, dtype=torch.int32), torch.full((2,), 65)
        if how == "end 0":
            end[1] = 0
        elif how == "first beyond":
            first[1] = 65
        else:
            key_mask = torch.ones(2, 65, dtype=torch.bool)
            key_mask[1] = False
        key_range = make_key_range(2, 65, first=first, end=end, query_start=65 - num_queries, key_mask=key_mask)
        call.arguments["key_range"] = key_range.to(device)
        output, lse = poison_unseen(call).run()
        assert_right(output, call, lse)
        self.assert_empty(output, lse, 1)

    def test_queries_before_the_first_key(self, num_queries, device):
        """Left padding's own rows under causal attention."""
        call = build({"lse"}, num_queries, num_queries, device=device)
        first = torch.tensor([0, num_queries // 2 + 1])
        call.arguments["key_range"] = make_key_range(2, num_queries, first=first, right=0).to(device)
        output, lse = poison_unseen(call).run()
        assert_right(output, call, lse)
        self.assert_empty(output[1], lse[1], (slice(None), slice(0, num_queries // 2 + 1)))

    def test_window_past_the_end(self, num_queries, device):
        """Queries that stand behind all keys by more than their window."""
        call = build({"lse"}, num_queries, 65, device=device)
        call.arguments["key_range"] = make_key_range(2, 65, end=20, query_start=40, left=3).to(device)
        output, lse = poison_unseen(call).run()
        self.assert_empty(output, lse, slice(None))

    def test_sinks_alone(self, num_queries, device):
        """The sink is then all of the denominator: zeros still, and its own logit as lse."""
        call = build({"lse", "sinks"}, num_queries, 65, device=device)
        call.arguments["key_range"] = make_key_range(2, 65, end=0).to(device)
        output, lse = poison_unseen(call).run()
        assert not output.any()
        want = call.arguments["sinks"][None, :, None].expand_as(lse)
        torch.testing.assert_close(lse, want, atol=1e-5, rtol=1e-5)


def test_an_expanded_mask_in_rows_keeps_a_gradient_for_each_element():
    """Where nobody asks for one it is copied without what `expand` made of it."""
    scattered = torch.randn(5, 7, 2).permute(2, 0, 1)[None, :1].expand(3, 2, 5, 7)
    inputs = Inputs(*torch.randn(3, 3, 2, 5, 8), mask=scattered)
    copied = with_mask_in_rows(inputs).mask
    assert copied.shape == (1, 1, 5, 7) and copied.is_contiguous() and torch.equal(copied.expand(3, 2, 5, 7), scattered)
    mask, weights = scattered.detach().requires_grad_(), torch.randn(3, 2, 5, 7)
    (with_mask_in_rows(inputs._replace(mask=mask)).mask * weights).sum().backward()
    assert torch.equal(mask.grad, weights)
    in_rows = torch.randn(3, 1, 5, 7)
    assert with_mask_in_rows(inputs._replace(mask=in_rows)).mask is in_rows


def test_wrong_key_range_reads_nothing_outside(device):
    """First and end are clamped: nonsense may hide keys, but reads no memory that is not the tensors'."""
    for num_queries in (3, 33):
        call = build((), num_queries, 65, device=device)
        key_range = make_key_range(2, 65, first=-5, end=1000, query_start=65 - num_queries, right=0).to(device)
        assert torch.equal(call.run(key_range=key_range), call.run(is_causal=True))


def test_nan_that_is_seen_is_not_hidden(device):
    """Zeros are for rows without a key; a NaN among the keys that a row sees must stay one."""
    for num_queries in (1, 33):
        call = build((), num_queries, 65, device=device)
        call.key[0, 0, 5] = float("nan")
        output = attention(call.query, call.key, call.value)
        assert output[0, :2].isnan().all() and torch.isfinite(output[0, 2:]).all()


@pytest.mark.parametrize("sinks_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sinks_dtype(sinks_dtype, device):
    for num_queries in (3, 33):
        call = build({"causal", "lse"}, num_queries, 65, device=device)
        call.arguments["sinks"] = torch.randn(4, generator=torch.Generator().manual_seed(1)).to(sinks_dtype).to(device)
        output, lse = call.run()
        assert_right(output, call, lse)

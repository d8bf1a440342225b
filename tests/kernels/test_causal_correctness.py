"""Causal attention: against SDPA, the structure of the mask itself, with a cache, and full attention left alone."""

import pytest
import torch
import torch.nn.functional as F
from flashcore_kernels import attention, attention_with_kv_cache, make_key_range
from flashcore_kernels.key_range import visible

from .reference import Call, assert_right

LENGTHS = (1, 5, 17, 127, 129)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def tensors(num_queries, num_keys, device, heads=(4, 2), head_dim=32, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads[0], num_queries), (heads[1], num_keys), (heads[1], num_keys))
    return tuple(torch.randn(2, h, n, head_dim, generator=generator).to(dtype).to(device) for h, n in sizes)


def attended(num_queries, num_keys, device, **arguments) -> torch.Tensor:
    """bool `[Q, K]`: which keys the kernel really attends to, read off its output.

    With all scores equal and a one-hot value for each key, output element k is 1 / (number of keys seen) where key k is
    seen, and 0 where not.
    """
    query = torch.zeros(1, 1, num_queries, 16, device=device)
    key = torch.zeros(1, 1, num_keys, 16, device=device)
    seen = []
    for begin in range(0, num_keys, 256):
        value = torch.eye(num_keys, device=device)[None, None, :, begin : begin + 256].contiguous()
        seen.append(attention(query, key, value, **arguments)[0, 0] > 0)
    return torch.cat(seen, dim=1)


class TestAgainstSDPA:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("length", LENGTHS)
    def test_square(self, length, dtype, device):
        call = Call(*tensors(length, length, device, dtype=DTYPES[dtype], seed=length), {"is_causal": True})
        assert_right(call.run(), call)

    @pytest.mark.parametrize("length", LENGTHS)
    def test_sdpas_own_is_causal(self, length, device):
        """Not through a mask that we built: SDPA's own idea of causal, in fp32."""
        query, key, value = tensors(length, length, device, dtype=torch.float32)
        want = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(attention(query, key, value, is_causal=True), want, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("head_dim", [16, 64, 128])
    @pytest.mark.parametrize("heads", [(4, 4), (4, 1), (7, 1)], ids=str)
    def test_shapes(self, heads, head_dim, device):
        call = Call(*tensors(33, 33, device, heads=heads, head_dim=head_dim), {"is_causal": True})
        assert_right(call.run(), call)


class TestMaskStructure:
    @pytest.mark.parametrize("length", LENGTHS)
    def test_lower_triangle(self, length, device):
        seen = attended(length, length, device, is_causal=True)
        assert torch.equal(seen, torch.ones(length, length, dtype=torch.bool, device=device).tril())

    @pytest.mark.parametrize("num_queries, num_keys", [(1, 17), (5, 17), (17, 127), (127, 129), (16, 17), (64, 129)])
    def test_fewer_queries_than_keys(self, num_queries, num_keys, device):
        """The queries are the last tokens: the diagonal ends in the last corner, not in the first row's."""
        seen = attended(num_queries, num_keys, device, is_causal=True)
        want = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
        assert torch.equal(seen, want)
        assert seen[-1].all() and seen[0].sum() == num_keys - num_queries + 1

    @pytest.mark.parametrize("num_queries, num_keys", [(5, 3), (33, 17)])
    def test_more_queries_than_keys(self, num_queries, num_keys, device):
        seen = attended(num_queries, num_keys, device, is_causal=True)
        want = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
        assert torch.equal(seen, want)
        assert not seen[0].any()

    @pytest.mark.parametrize("num_queries", [1, 9, 33])
    @pytest.mark.parametrize("window", [1, 2, 5, 32, 33, 64])
    def test_band_of_a_sliding_window(self, window, num_queries, device):
        seen = attended(num_queries, 65, device, is_causal=True, window=window)
        ones = torch.ones(num_queries, 65, dtype=torch.bool, device=device)
        assert torch.equal(seen, ones.tril(65 - num_queries) & ones.triu(65 - num_queries - window + 1))
        assert seen.sum(1).max() <= window

    @pytest.mark.parametrize("num_queries", [1, 33])
    def test_what_a_key_range_says(self, num_queries, device):
        key_range = make_key_range(1, 65, first=3, end=50, query_start=65 - num_queries - 10, right=0, device=device)
        seen = attended(num_queries, 65, device, key_range=key_range)
        assert torch.equal(seen, visible(key_range, num_queries, 65)[0, 0])

    def test_full_attention_sees_everything(self, device):
        for num_queries in (1, 17, 65):
            assert attended(num_queries, 65, device).all()

    def test_later_tokens_change_nothing(self, device):
        """The bits of a row do not depend on what the tokens behind it are."""
        query, key, value = tensors(65, 65, device)
        whole = attention(query, key, value, is_causal=True)
        for tensor in (query, key, value):
            tensor[:, :, 40:] = tensor[:, :, 40:] * -3
        assert torch.equal(attention(query, key, value, is_causal=True)[:, :, :40], whole[:, :, :40])

    def test_the_diagonal_itself_is_seen(self, device):
        query, key, value = tensors(17, 17, device)
        output = attention(query, key, value, is_causal=True)
        assert torch.equal(output[:, :, 0], value.repeat_interleave(2, dim=1)[:, :, 0])


class TestWithCache:
    @pytest.mark.parametrize("past", LENGTHS)
    @pytest.mark.parametrize("new", [1, 5, 17])
    def test_chunk_behind_a_past(self, new, past, device):
        query, key, value = tensors(past + new, past + new, device, seed=past)
        head, tail = ([t[:, :, a:b] for t in (query, key, value)] for a, b in ((0, past), (past, past + new)))
        _, cache = attention_with_kv_cache(*head)
        output, _ = attention_with_kv_cache(*tail, cache)
        assert_right(output, Call(tail[0], key, value, {"is_causal": True}))

    def test_not_causal_sees_the_whole_chunk(self, device):
        query, key, value = tensors(9, 9, device)
        _, cache = attention_with_kv_cache(query[:, :, :6], key[:, :, :6], value[:, :, :6])
        output, _ = attention_with_kv_cache(query[:, :, 6:], key[:, :, 6:], value[:, :, 6:], cache, is_causal=False)
        assert_right(output, Call(query[:, :, 6:], key, value, {}))


class TestFullAttentionUnchanged:
    @pytest.mark.parametrize("length", LENGTHS)
    def test_default_is_full(self, length, device):
        call = Call(*tensors(length, length, device), {})
        assert_right(call.run(), call)

    @pytest.mark.parametrize("num_queries", [1, 33])
    def test_one_query_token_last_is_the_same_either_way(self, num_queries, device):
        """The last token sees everything under causal attention too: the same bits."""
        query, key, value = tensors(num_queries, 65, device)
        causal, full = (attention(query, key, value, is_causal=is_causal) for is_causal in (True, False))
        assert torch.equal(causal[:, :, -1], full[:, :, -1])
        assert num_queries == 1 or not torch.equal(causal, full)

    def test_cross_attention(self, device):
        call = Call(*tensors(33, 17, device), {})
        assert_right(call.run(), call)


@pytest.mark.parametrize("num_queries", [1, 17, 65])
def test_negative_controls(num_queries, device):
    """Full instead of causal, top-left alignment, and a diagonal off by one break the error rule."""
    query, key, value = tensors(num_queries, 65, device)
    call = Call(query, key, value, {"is_causal": True})
    wrong = [
        make_key_range(2, 65, query_start=65 - num_queries - 1, right=0, device=device),
        make_key_range(2, 65, query_start=65 - num_queries - 1, right=-1, device=device),
        make_key_range(2, 65, query_start=0, right=0, device=device),
    ]
    same = {1: (1,), 17: (), 65: (2,)}[num_queries]  # which of them are no mistake at this length
    for place, key_range in enumerate(wrong):
        output = attention(query, key, value, key_range=key_range)
        if place in same:
            assert_right(output, call)
        else:
            with pytest.raises(AssertionError, match="error"):
                assert_right(output, call)

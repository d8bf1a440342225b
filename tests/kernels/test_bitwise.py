"""The same bits: in two runs of one call, and for a sequence alone, batched or padded. And the splits of a decode."""

import pytest
import torch
from flashcore_kernels import attention, explain, make_key_range
from flashcore_kernels.choose import choose
from flashcore_kernels.device import Device
from flashcore_kernels.plan import most_chunks
from flashcore_kernels.problem import Inputs, check_problem

from .reference import Call, assert_right, build

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def tensors(batch_size, num_queries, num_keys, device, dtype=torch.float16, heads=(2, 1), head_dim=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads[0], num_queries), (heads[1], num_keys), (heads[1], num_keys))
    return tuple(torch.randn(batch_size, h, n, head_dim, generator=generator).to(dtype).to(device) for h, n in sizes)


@pytest.mark.parametrize("features", [("causal",), ("causal", "holes", "sinks"), ("rows",), ("float-mask",)], ids=str)
@pytest.mark.parametrize("num_queries", [1, 33])
def test_two_runs(num_queries, features, device):
    call = build({*features, "lse"}, num_queries, 129, device=device)
    (one, lse_one), (two, lse_two) = call.run(), call.run()
    assert torch.equal(one, two) and torch.equal(lse_one, lse_two)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 5, 33])
@pytest.mark.parametrize("padding", ["left", "right", "unfilled"])
class TestAloneAndInABatch:
    """Sequence 1 has 70 keys; its batch has 203 slots, and the others use all of them."""

    OWN, SLOTS = 70, 203

    def batch(self, padding, num_queries, dtype, device):
        query, key, value = tensors(3, num_queries, self.SLOTS, device, DTYPES[dtype])
        first, end = torch.zeros(3, dtype=torch.int32), torch.full((3,), self.SLOTS, dtype=torch.int32)
        if padding == "left":
            first[1] = self.SLOTS - self.OWN
        else:
            end[1] = self.OWN
        own = slice(first[1].item(), end[1].item())
        slots = self.SLOTS + 100 if padding == "unfilled" else self.SLOTS
        if padding == "unfilled":
            key, value = (torch.nn.functional.pad(t, (0, 0, 0, 100), value=float("nan")) for t in (key, value))
        key_range = make_key_range(3, slots, first=first, end=end, query_start=end - num_queries, right=0)
        return query, key, value, key_range.to(device), own

    def test_same_bits(self, padding, num_queries, dtype, device):
        query, key, value, key_range, own = self.batch(padding, num_queries, dtype, device)
        batched, lse = attention(query, key, value, key_range=key_range, return_lse=True)
        alone, lse_alone = attention(query[1:2], key[1:2, :, own], value[1:2, :, own], is_causal=True, return_lse=True)
        assert torch.equal(batched[1:2], alone) and torch.equal(lse[1:2], lse_alone)


@pytest.mark.parametrize("num_queries", [1, 5, 33])
def test_it_matters_where_the_blocks_begin(num_queries, device):
    """The inverse: had padding moved the blocks, the bits above would have differed.

    One hidden key in front moves every block by one. The sum is the same, its fp32 bits are not.
    """
    query, key, value = tensors(1, num_queries, 70, device, torch.float32)
    moved_key, moved_value = (torch.cat([t[:, :, :1] * 0, t], dim=2) for t in (key, value))
    mask = torch.ones(1, 1, 1, 71, dtype=torch.bool, device=device)
    mask[..., 0] = False
    alone = attention(query, key, value, is_causal=True)
    moved = attention(query, moved_key, moved_value, is_causal=True, mask=mask)
    torch.testing.assert_close(alone, moved, atol=1e-5, rtol=1e-5)
    assert not torch.equal(alone, moved)


class TestSplits:
    """Decode over so many keys that a head's work is cut and merged."""

    def used(self, query, key, value, device):
        config = choose(check_problem(Inputs(query, key, value)), Device("interpreter")).config
        return most_chunks(key.shape[2], config.min_chunk, config.max_chunks)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("num_keys", [127, 128, 129, 257, 1023, 5000])
    def test_merge(self, num_keys, dtype, device):
        query, key, value = tensors(1, 1, num_keys, device, DTYPES[dtype])
        call = Call(query, key, value, {"is_causal": True, "return_lse": True})
        output, lse = call.run()
        assert_right(output, call, lse)
        assert num_keys < 129 or self.used(query, key, value, device) > 1

    @pytest.mark.parametrize("options", [{"softcap": 1.5}, {"window": 700}, {"sinks": True}], ids=str)
    def test_merge_with(self, options, device):
        query, key, value = tensors(2, 3, 1500, device)
        options = {"sinks": torch.randn(2, device=device)} if "sinks" in options else options
        call = Call(query, key, value, {"is_causal": True, **options})
        assert_right(call.run(), call)

    def test_chunks_without_a_key(self, device):
        """Holes as wide as several chunks: a chunk whose maximum is -inf adds nothing, and makes no NaN."""
        query, key, value = tensors(2, 2, 1500, device)
        key_mask = torch.ones(2, 1500, dtype=torch.bool)
        key_mask[0, 100:900] = False
        key_mask[1, 1:1499] = False
        for tensor in (key, value):
            tensor.masked_fill_(~key_mask[:, None, :, None].to(device), float("nan"))
        key_range = make_key_range(2, 1500, key_mask=key_mask).to(device)
        call = Call(query, key, value, {"key_range": key_range})
        output, lse = call.run(return_lse=True)
        assert_right(output, call, lse)

    def test_sequences_of_very_different_lengths(self, device):
        """Each has its own number of chunks; one has no key at all, and one a single key."""
        query, key, value = tensors(4, 1, 2000, device)
        end = torch.tensor([2000, 0, 1, 300], dtype=torch.int32, device=device)
        for b, length in enumerate(end.tolist()):
            key[b, :, length:] = value[b, :, length:] = float("nan")
        key_range = make_key_range(4, 2000, end=end, query_start=end - 1, right=0)
        call = Call(query, key, value, {"key_range": key_range})
        output, lse = call.run(return_lse=True)
        assert_right(output, call, lse)
        assert not output[1].any()
        for b, length in ((0, 2000), (2, 1), (3, 300)):
            alone = attention(query[b : b + 1], key[b : b + 1, :, :length], value[b : b + 1, :, :length])
            assert torch.equal(output[b : b + 1], alone)

    def test_most_chunks(self, device):
        """More keys than max_chunks chunks of the least size: the chunks grow."""
        query, key, value = tensors(1, 1, 9000, device, head_dim=16)
        call = Call(query, key, value, {"is_causal": True})
        assert_right(call.run(), call)

    def test_a_lost_chunk_would_show(self, device):
        """Negative control: the answer of all but the last chunk breaks the error rule."""
        query, key, value = tensors(1, 1, 1500, device)
        call = Call(query, key, value, {"is_causal": True})
        with pytest.raises(AssertionError, match="error"):
            assert_right(attention(query, key[:, :, :1400], value[:, :, :1400]), call)

    def test_rows_do_not_depend_on_how_many_queries_are_asked(self, device):
        """Not promised across tiles, but all of a decode's token counts that share one give the same bits."""
        query, key, value = tensors(1, 4, 300, device)
        together = attention(query, key, value, is_causal=True)
        alone = attention(query[:, :, 3:], key, value, is_causal=True)
        assert explain(query, key, value).startswith("flashcore_decode")
        assert torch.equal(together[:, :, 3:], alone)

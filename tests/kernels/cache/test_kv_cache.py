"""attention_with_kv_cache: whatever way tokens enter a cache, the outputs are those of attention over all of them."""

import pytest
import torch
from flashcore_kernels import KVCache, attention, attention_with_kv_cache, make_key_range, path_counts

from ..reference import Call, assert_right

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def tokens(length, device, *, batch_size=2, heads=(4, 2), head_dim=32, value_dim=None, dtype=torch.float16, seed=0):
    """query, key, value of `length` tokens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads[0], head_dim), (heads[1], head_dim), (heads[1], value_dim or head_dim))
    return tuple(torch.randn(batch_size, h, length, d, generator=generator).to(dtype).to(device) for h, d in sizes)


def part(qkv, begin, end):
    return tuple(tensor[:, :, begin:end] for tensor in qkv)


def feed(qkv, steps, cache=None, **options):
    """Give the tokens in chunks of `steps`; all outputs in a row, and the cache."""
    outputs, begin = [], 0
    for step in steps:
        output, cache = attention_with_kv_cache(*part(qkv, begin, begin + step), cache, **options)
        outputs.append(output)
        begin += step
    return torch.cat(outputs, dim=2), cache


def poison_unfilled(cache: KVCache) -> None:
    for buffer in (cache.key, cache.value):
        for b, length in enumerate(cache.lengths.tolist()):
            buffer[b, :, length:] = float("nan")


class TestFirstCall:
    def test_makes_a_cache(self, device):
        qkv = tokens(17, device)
        output, cache = attention_with_kv_cache(*qkv)
        assert_right(output, Call(*qkv, {"is_causal": True}))
        assert isinstance(cache, KVCache)
        assert cache.lengths.tolist() == [17, 17] and cache.longest == 17
        assert cache.key.dtype == torch.float16 and cache.key.device == qkv[0].device
        assert torch.equal(cache.key[:, :, :17], qkv[1]) and torch.equal(cache.value[:, :, :17], qkv[2])

    def test_of_one_token(self, device):
        qkv = tokens(1, device)
        output, cache = attention_with_kv_cache(*qkv)
        # Softmax over one key is 1, so each head gives its KV head's value.
        assert torch.equal(output, qkv[2].repeat_interleave(2, dim=1))
        assert cache.longest == 1

    def test_into_an_empty_cache_of_ones_own(self, device):
        qkv = tokens(17, device)
        given = KVCache(2, 2, 32, max_length=40, dtype=torch.float16, device=device)
        poison_unfilled(given)
        output, cache = attention_with_kv_cache(*qkv, given)
        assert cache is given
        assert_right(output, Call(*qkv, {"is_causal": True}))

    def test_max_length_is_allocated_at_once(self, device):
        _, cache = attention_with_kv_cache(*tokens(3, device), max_length=19)
        assert cache.capacity == cache.max_length == 19


class TestPrefillAndDecode:
    @pytest.mark.parametrize("length", [1, 5, 17, 127, 129])
    def test_one_token_after_a_prefill(self, length, device):
        qkv = tokens(length + 1, device, seed=length)
        outputs, cache = feed(qkv, (length, 1), max_length=length + 1)
        assert_right(outputs, Call(*qkv, {"is_causal": True}))
        assert cache.lengths.tolist() == [length + 1] * 2

    @pytest.mark.parametrize("steps", [(1,) * 9, (5, 1, 1, 1), (17, 17), (3, 20, 1), (40, 2, 1)], ids=str)
    def test_any_chunks(self, steps, device):
        qkv = tokens(sum(steps), device)
        outputs, _ = feed(qkv, steps)
        assert_right(outputs, Call(*qkv, {"is_causal": True}))

    def test_unfilled_slots_may_hold_nan(self, device):
        qkv = tokens(40, device)
        outputs, cache = [], KVCache(2, 2, 32, max_length=200, dtype=torch.float16, device=device)
        for begin, end in ((0, 33), (33, 34), (34, 40)):
            poison_unfilled(cache)
            output, cache = attention_with_kv_cache(*part(qkv, begin, end), cache)
            outputs.append(output)
        assert_right(torch.cat(outputs, dim=2), Call(*qkv, {"is_causal": True}))

    def test_kernels_serve_it(self, device):
        path_counts.clear()
        feed(tokens(22, device), (20, 1, 1))
        assert dict(path_counts) == {"flashcore_forward": 1, "flashcore_decode": 2}

    def test_bidirectional(self, device):
        qkv = tokens(24, device)
        _, cache = attention_with_kv_cache(*part(qkv, 0, 20), is_causal=False)
        output, _ = attention_with_kv_cache(*part(qkv, 20, 24), cache, is_causal=False)
        assert_right(output, Call(qkv[0][:, :, 20:], qkv[1], qkv[2], {}))

    def test_lse(self, device):
        qkv = tokens(18, device)
        _, cache = attention_with_kv_cache(*part(qkv, 0, 17))
        (output, lse), _ = attention_with_kv_cache(*part(qkv, 17, 18), cache, return_lse=True)
        assert_right(output, Call(qkv[0][:, :, 17:], qkv[1], qkv[2], {"is_causal": True}), lse)

    def test_cache_alone(self, device):
        """Without new keys the queries are the cache's last tokens."""
        qkv = tokens(20, device)
        _, cache = attention_with_kv_cache(*qkv)
        output, same = attention_with_kv_cache(qkv[0][:, :, 17:], None, None, cache)
        assert same is cache and cache.longest == 20
        assert_right(output, Call(qkv[0][:, :, 17:], qkv[1], qkv[2], {"is_causal": True}))


CONFIGURATIONS = {
    "mha": {"heads": (4, 4)},
    "mqa": {"heads": (4, 1)},
    "7to1": {"heads": (7, 1)},
    "batch of 1": {"batch_size": 1},
    "batch of 3": {"batch_size": 3},
    "head_dim 16": {"head_dim": 16},
    "head_dim 80": {"head_dim": 80},
    "head_dim 128": {"head_dim": 128},
    "value_dim of its own": {"value_dim": 24},
    "bf16": {"dtype": torch.bfloat16},
    "fp32": {"dtype": torch.float32},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration(name, device):
    qkv = tokens(36, device, **CONFIGURATIONS[name])
    outputs, _ = feed(qkv, (33, 1, 2))
    assert_right(outputs, Call(*qkv, {"is_causal": True}))


@pytest.mark.parametrize("options", [{"window": 7}, {"softcap": 1.5}, {"scale": 0.3}, {"window": (9, 0)}], ids=str)
def test_option(options, device):
    qkv = tokens(36, device)
    outputs, _ = feed(qkv, (33, 1, 2), **options)
    assert_right(outputs, Call(*qkv, {"is_causal": True, **options}))


def test_sinks(device):
    qkv = tokens(36, device)
    sinks = torch.randn(4, device=device)
    outputs, _ = feed(qkv, (33, 1, 2), sinks=sinks)
    assert_right(outputs, Call(*qkv, {"is_causal": True, "sinks": sinks}))


class TestPerSequenceLengths:
    """Sequences of 20, 3 and 11 tokens in one batch, right-padded; then steps of one and of two tokens."""

    LENGTHS = (20, 3, 11)

    def grown(self, device, **options):
        """Outputs of each sequence's own tokens, and of the same tokens alone in a batch of one."""
        qkv = tokens(23, device, batch_size=3)
        padded = tuple(tensor[:, :, :20].clone() for tensor in qkv)
        for tensor in padded:
            for b, length in enumerate(self.LENGTHS):
                tensor[b, :, length:] = float("nan")
        first, cache = attention_with_kv_cache(
            *padded, new_lengths=torch.tensor(self.LENGTHS, device=device), **options
        )
        poison_unfilled(cache)
        outputs = [first]
        for begin, end in ((0, 1), (1, 3)):
            step = tuple(
                torch.stack([t[b, :, length + begin : length + end] for b, length in enumerate(self.LENGTHS)])
                for t in qkv
            )
            output, cache = attention_with_kv_cache(*step, cache, **options)
            outputs.append(output)
        assert cache.lengths.tolist() == [length + 3 for length in self.LENGTHS]
        return qkv, outputs

    @pytest.mark.parametrize("options", [{}, {"window": 5}, {"is_causal": False}], ids=str)
    def test_each_sequence_is_right(self, options, device):
        qkv, (first, second, third) = self.grown(device, **options)
        for b, length in enumerate(self.LENGTHS):
            alone = tuple(tensor[b : b + 1] for tensor in qkv)
            for output, begin, end in (
                (first, 0, length),
                (second, length, length + 1),
                (third, length + 1, length + 3),
            ):
                call = Call(alone[0][:, :, begin:end], *part(alone[1:], 0, end), {"is_causal": True, **options})
                assert_right(output[b : b + 1, :, : end - begin], call)

    def test_bitwise_the_same_alone(self, device):
        """A sequence gets the same bits alone as in a batch with longer ones."""
        qkv, (_, second, _) = self.grown(device)
        for b, length in enumerate(self.LENGTHS):
            alone = tuple(tensor[b : b + 1] for tensor in qkv)
            _, cache = attention_with_kv_cache(*part(alone, 0, length))
            output, _ = attention_with_kv_cache(*part(alone, length, length + 1), cache)
            assert torch.equal(second[b : b + 1], output)

    def test_lengths_ignored_would_show(self, device):
        """Negative control: attending to the padding as well breaks the error rule."""
        qkv, (_, second, _) = self.grown(device)
        key, value = (tensor[1:2, :, :21] for tensor in qkv[1:])
        call = Call(qkv[0][1:2, :, 3:4], key[:, :, :4], value[:, :, :4], {"is_causal": True})
        assert_right(second[1:2], call)
        with pytest.raises(AssertionError, match="error"):
            assert_right(attention(call.query, key, value), call)

    def test_cache_alone(self, device):
        """Without new keys each sequence's queries stand at its own last slots."""
        qkv = tokens(20, device, batch_size=3)
        _, cache = attention_with_kv_cache(*qkv, new_lengths=torch.tensor(self.LENGTHS, device=device))
        query = torch.stack([qkv[0][b, :, length - 2 : length] for b, length in enumerate(self.LENGTHS)])
        output, _ = attention_with_kv_cache(query, None, None, cache)
        for b, length in enumerate(self.LENGTHS):
            key, value = (tensor[b : b + 1, :, :length] for tensor in qkv[1:])
            assert_right(output[b : b + 1], Call(query[b : b + 1], key, value, {"is_causal": True}))

    def test_a_sequence_may_receive_nothing(self, device):
        qkv = tokens(6, device)
        _, cache = attention_with_kv_cache(*part(qkv, 0, 5), new_lengths=torch.tensor([5, 0], device=device))
        output, cache = attention_with_kv_cache(*part(qkv, 5, 6), cache)
        assert cache.lengths.tolist() == [6, 1]
        assert torch.equal(output[1], qkv[2][1, :, 5:6].repeat_interleave(2, dim=0))


class TestCapacity:
    def test_grows_and_keeps_what_it_held(self, device):
        qkv = tokens(300, device, heads=(1, 1), head_dim=16)
        _, cache = attention_with_kv_cache(*part(qkv, 0, 250))
        before = cache.capacity
        output, cache = attention_with_kv_cache(*part(qkv, 250, 300), cache)
        assert cache.capacity >= 2 * before
        assert torch.equal(cache.key[:, :, :300], qkv[1])
        assert_right(output, Call(qkv[0][:, :, 250:], qkv[1], qkv[2], {"is_causal": True}))

    def test_exactly_full(self, device):
        qkv = tokens(20, device)
        outputs, cache = feed(qkv, (19, 1), max_length=20)
        assert cache.longest == cache.capacity == 20
        assert_right(outputs, Call(*qkv, {"is_causal": True}))

    @pytest.mark.parametrize("too_many", [2, 5, 40])
    def test_overflow_raises_before_anything_is_written(self, too_many, device):
        qkv = tokens(19 + too_many, device)
        _, cache = attention_with_kv_cache(*part(qkv, 0, 19), max_length=20)
        key, value, lengths = cache.key.clone(), cache.value.clone(), cache.lengths.clone()
        with pytest.raises(ValueError, match=rf"overflow.*19 tokens.*max_length=20, and {too_many} more"):
            attention_with_kv_cache(*part(qkv, 19, 19 + too_many), cache)
        assert torch.equal(cache.key, key) and torch.equal(cache.value, value)
        assert torch.equal(cache.lengths, lengths) and cache.longest == 19
        # ... and it is still usable.
        output, cache = attention_with_kv_cache(*part(qkv, 19, 20), cache)
        assert_right(output, Call(qkv[0][:, :, 19:20], *part(qkv[1:], 0, 20), {"is_causal": True}))

    def test_overflow_at_the_first_call(self, device):
        with pytest.raises(ValueError, match="overflow"):
            attention_with_kv_cache(*tokens(9, device), max_length=8)

    def test_overflow_is_found_without_reading_the_lengths(self, device, monkeypatch):
        qkv = tokens(20, device)
        _, cache = attention_with_kv_cache(*part(qkv, 0, 19), max_length=19)

        def sync(*_):
            raise AssertionError("a device value was read")

        for name in ("item", "tolist", "__bool__", "__int__", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, sync)
        with pytest.raises(ValueError, match="overflow"):
            attention_with_kv_cache(*part(qkv, 19, 20), cache)

    def test_reset(self, device):
        qkv = tokens(20, device)
        _, cache = attention_with_kv_cache(*qkv, max_length=20, new_lengths=torch.tensor([20, 3], device=device))
        cache.reset()
        poison_unfilled(cache)
        output, again = attention_with_kv_cache(*qkv, cache)
        assert again is cache and cache.lengths.tolist() == [20, 20]
        assert_right(output, Call(*qkv, {"is_causal": True}))


class TestUpdateCacheFalse:
    @pytest.mark.parametrize("lengths", [None, (17, 9)], ids=["equal", "per sequence"])
    def test_leaves_the_cache_as_it_was(self, lengths, device):
        qkv = tokens(19, device)
        lengths = None if lengths is None else torch.tensor(lengths, device=device)
        _, cache = attention_with_kv_cache(*part(qkv, 0, 17), new_lengths=lengths, max_length=19)
        before = cache.lengths.clone()
        peek, same = attention_with_kv_cache(*part(qkv, 17, 19), cache, update_cache=False)
        assert same is cache and cache.longest == 17 and torch.equal(cache.lengths, before)
        # Asked again, and then for good: the same bits.
        again, _ = attention_with_kv_cache(*part(qkv, 17, 19), cache, update_cache=False)
        kept, _ = attention_with_kv_cache(*part(qkv, 17, 19), cache)
        assert torch.equal(peek, again) and torch.equal(peek, kept)

    def test_may_look_beyond_a_full_cache(self, device):
        qkv = tokens(21, device)
        _, cache = attention_with_kv_cache(*part(qkv, 0, 20), max_length=20)
        output, same = attention_with_kv_cache(*part(qkv, 20, 21), cache, update_cache=False)
        assert same is cache and cache.capacity == 20
        assert_right(output, Call(qkv[0][:, :, 20:], qkv[1], qkv[2], {"is_causal": True}))

    def test_without_a_cache(self, device):
        qkv = tokens(17, device)
        output, cache = attention_with_kv_cache(*qkv, update_cache=False)
        assert cache is None
        assert_right(output, Call(*qkv, {"is_causal": True}))


class TestCacheOfAnotherModel:
    @pytest.mark.parametrize(
        "other",
        [
            {"heads": (4, 4)},
            {"heads": (4, 1)},
            {"head_dim": 16},
            {"value_dim": 16},
            {"batch_size": 1},
            {"dtype": torch.float32},
            {"dtype": torch.bfloat16},
        ],
        ids=str,
    )
    def test_is_refused_and_unharmed(self, other, device):
        qkv = tokens(18, device)
        _, cache = attention_with_kv_cache(*part(qkv, 0, 17))
        held = cache.key.clone()
        with pytest.raises(ValueError, match="this cache holds"):
            attention_with_kv_cache(*tokens(1, device, **other), cache)
        assert torch.equal(cache.key, held) and cache.longest == 17
        output, _ = attention_with_kv_cache(*part(qkv, 17, 18), cache)
        assert_right(output, Call(qkv[0][:, :, 17:], qkv[1], qkv[2], {"is_causal": True}))


class TestBadInput:
    def refused(self, match, *arguments, **options):
        with pytest.raises(ValueError, match=match):
            attention_with_kv_cache(*arguments, **options)

    def test_key_without_value(self, device):
        query, key, _ = tokens(3, device)
        self.refused("key and value: one is None", query, key, None)

    def test_nothing_to_attend_to(self, device):
        query, _, _ = tokens(3, device)
        self.refused("nothing to attend to", query, None, None)
        empty = KVCache(2, 2, 32, dtype=torch.float16, device=device)
        self.refused("nothing to attend to", query, None, None, empty)

    def test_lengths_of_query_and_key_differ(self, device):
        query, key, value = tokens(3, device)
        self.refused("length of query and key", query[:, :, :2], key, value)

    def test_new_lengths_of_a_wrong_shape(self, device):
        self.refused("new_lengths shape", *tokens(3, device), new_lengths=torch.tensor([3, 3, 3], device=device))

    @pytest.mark.parametrize("size", ["batch_size", "num_kv_heads", "head_dim", "value_dim", "max_length"])
    def test_cache_without_room(self, size):
        sizes = {"batch_size": 1, "num_kv_heads": 1, "head_dim": 16, "value_dim": 16, "max_length": 8, size: 0}
        with pytest.raises(ValueError, match=f"{size}: got 0"):
            KVCache(**sizes)

    def test_cache_alone_with_more_queries_than_tokens(self, device):
        """Queries before the first slot stand nowhere and see nothing under causal attention."""
        qkv = tokens(3, device)
        _, cache = attention_with_kv_cache(*qkv)
        output, _ = attention_with_kv_cache(tokens(5, device)[0], None, None, cache)
        assert not output[:, :, :2].any() and output[:, :, 2:].all()


def test_equals_a_key_range_by_hand(device):
    """What the cache-level call does is a KeyRange over the buffers."""
    qkv = tokens(21, device)
    lengths = torch.tensor([20, 8], device=device)
    _, cache = attention_with_kv_cache(*part(qkv, 0, 20), new_lengths=lengths, max_length=32)
    output, cache = attention_with_kv_cache(*part(qkv, 20, 21), cache)
    poison_unfilled(cache)
    by_hand = attention(
        qkv[0][:, :, 20:], cache.key, cache.value,
        key_range=make_key_range(2, 32, end=lengths + 1, query_start=lengths, right=0),
    )  # fmt: skip
    assert torch.equal(output, by_hand)

"""Grouped-query attention: query head h reads KV head h // group, and nothing is ever expanded to say so."""

import pytest
import torch
from flashcore_kernels import attention, attention_with_kv_cache, path_counts
from torch.utils._python_dispatch import TorchDispatchMode

from .reference import Call, assert_right

# (query heads, KV heads)
RATIOS = {"1to1": (4, 4), "2to1": (4, 2), "4to1": (8, 2), "8to1": (8, 1), "32to1": (32, 1), "7to1": (14, 2)}

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def tensors(heads, num_queries, num_keys, device, head_dim=32, dtype=torch.float16):
    generator = torch.Generator().manual_seed(heads[0])
    sizes = ((heads[0], num_queries), (heads[1], num_keys), (heads[1], num_keys))
    return tuple(torch.randn(2, h, n, head_dim, generator=generator).to(dtype).to(device) for h, n in sizes)


def broadcast(tensor, group):
    """`[B, Hkv, K, D]` -> `[B, Hkv * group, K, D]` by hand: each KV head stands before its group."""
    return torch.stack([tensor[:, h // group] for h in range(tensor.shape[1] * group)], dim=1)


@pytest.mark.parametrize("ratio", RATIOS)
class TestAgainstManualBroadcasting:
    @pytest.mark.parametrize("num_queries", [1, 5, 17])
    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
    def test_error_rule(self, ratio, is_causal, num_queries, device):
        query, key, value = tensors(RATIOS[ratio], num_queries, 65, device)
        group = query.shape[1] // key.shape[1]
        # The reference sees broadcast keys: no grouping in it can be wrong in the same way.
        call = Call(query, broadcast(key, group), broadcast(value, group), {"is_causal": is_causal})
        assert_right(attention(query, key, value, is_causal=is_causal), call)

    def test_prefill_bitwise(self, ratio, device):
        """A head's tile does not know of its group, so broadcasting by hand gives the same bits."""
        query, key, value = tensors(RATIOS[ratio], 17, 33, device)
        group = query.shape[1] // key.shape[1]
        by_hand = attention(query, broadcast(key, group), broadcast(value, group), is_causal=True)
        assert torch.equal(attention(query, key, value, is_causal=True), by_hand)

    def test_with_cache(self, ratio, device):
        query, key, value = tensors(RATIOS[ratio], 20, 20, device)
        group = query.shape[1] // key.shape[1]
        _, cache = attention_with_kv_cache(query[:, :, :18], key[:, :, :18], value[:, :, :18], max_length=20)
        assert cache.key.shape[1] == RATIOS[ratio][1]
        output, _ = attention_with_kv_cache(query[:, :, 18:], key[:, :, 18:], value[:, :, 18:], cache)
        call = Call(query[:, :, 18:], broadcast(key, group), broadcast(value, group), {"is_causal": True})
        assert_right(output, call)

    def test_lse_of_each_head(self, ratio, device):
        query, key, value = tensors(RATIOS[ratio], 3, 33, device)
        group = query.shape[1] // key.shape[1]
        output, lse = attention(query, key, value, is_causal=True, return_lse=True)
        assert_right(output, Call(query, broadcast(key, group), broadcast(value, group), {"is_causal": True}), lse)


@pytest.mark.parametrize("num_queries", [1, 17])
@pytest.mark.parametrize("ratio", ["2to1", "4to1", "7to1"])
def test_permuted_heads_would_show(ratio, num_queries, device):
    """Negative control: heads in another order, or interleaved groups (h % Hkv), break the error rule."""
    query, key, value = tensors(RATIOS[ratio], num_queries, 65, device)
    group = query.shape[1] // key.shape[1]
    output = attention(query, key, value, is_causal=True)
    for wrong in (lambda t: broadcast(t, group).flip(1), lambda t: t.repeat(1, group, 1, 1)):
        with pytest.raises(AssertionError, match="error"):
            assert_right(output, Call(query, wrong(key), wrong(value), {"is_causal": True}))


class LargestTensor(TorchDispatchMode):
    """Remembers the most bytes that any tensor made within it takes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


class TestMemory:
    # fp16: on the CPU the interpreter's bf16 is computed in copies, which would hide an expansion.
    HEADS, NUM_KEYS, HEAD_DIM = (32, 1), 512, 64
    EXPANDED = 32 * NUM_KEYS * HEAD_DIM * 2  # bytes of [1, H, K, D]

    @pytest.mark.parametrize("num_queries", [1, 17])
    def test_keys_are_never_expanded(self, num_queries, device):
        query, key, value = (t[:1].clone() for t in tensors(self.HEADS, num_queries, self.NUM_KEYS, device, 64))
        path_counts.clear()
        with LargestTensor() as made:
            _implementation(query, key, value)
        assert path_counts["torch"] == 0
        assert made.bytes < self.EXPANDED / 4

    def test_an_expansion_would_show(self, device):
        """Negative control: repeat_interleave, as eager attention does it."""
        _, key, _ = tensors(self.HEADS, 1, self.NUM_KEYS, device, 64)
        with LargestTensor() as made:
            key.repeat_interleave(32, dim=1)
        assert made.bytes >= self.EXPANDED

    def test_cache_holds_the_kv_heads_alone(self, device):
        query, key, value = tensors((8, 2), 4, 4, device)
        _, cache = attention_with_kv_cache(query, key, value, max_length=64)
        assert cache.key.untyped_storage().nbytes() == 2 * 2 * 64 * 32 * 2  # B * Hkv * capacity * D * bytes
        assert cache.value.untyped_storage().nbytes() == cache.key.untyped_storage().nbytes()


def _implementation(query, key, value):
    """The operator's body, below the dispatcher: what it allocates is seen by a TorchDispatchMode around it."""
    from flashcore_kernels.op import _run

    return _run(query, key, value, None, None, None, -1, 0, 0.125, 0.0, False)


@pytest.mark.parametrize("heads", [(3, 2), (2, 4), (7, 3), (8, 5)], ids=str)
def test_invalid_ratio(heads, device):
    query, key, value = tensors(heads, 2, 5, device)
    with pytest.raises(ValueError, match=rf"heads of query and key: got \[{heads[0]}, {heads[1]}\].*multiple"):
        attention(query, key, value)
    with pytest.raises(ValueError, match="heads of query and key"):
        attention_with_kv_cache(query, key[:, :, :2], value[:, :, :2])


def test_key_and_value_heads_must_agree(device):
    query, key, value = tensors((4, 2), 2, 5, device)
    with pytest.raises(ValueError, match="of key and value"):
        attention(query, key, value[:, :1])

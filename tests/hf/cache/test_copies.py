"""FlashCoreCache copied, pickled and saved; and keys and values that somebody assigns, as evictions do."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache

from ..compare import greedy, named
from ..models import model_pair, prompts

if Version(transformers.__version__) < Version("4.57"):
    pytest.skip("FlashCoreCache needs 4.57", allow_module_level=True)

from flashcore_hf.cache.flashcore_cache import FlashCoreCache
from flashcore_hf.cache.layer import FlashCoreLayer

from .test_flashcore_cache import assert_same, layer_pair, tokens


def through_file(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda cache: pickle.loads(pickle.dumps(cache)), "file": through_file}


@pytest.mark.parametrize("dtype", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("way", COPIES)
def test_a_copied_cache_goes_on(way, dtype, through_torch):
    """With its scales and in memory of its own; what was recorded on the original's buffers stays behind."""
    _, model = model_pair("gemma3_text")
    ids, mask = prompts(2, 9)
    cache = FlashCoreCache(model.config, dtype=dtype)
    first = greedy(model, ids, mask, 5, **named(cache))
    cache.graphs["recorded"] = lambda: None  # as a CUDA graph, nothing that could be pickled
    other = COPIES[way](cache)
    assert not other.graphs
    for layer, copied in zip(cache.layers, other.layers):
        assert torch.equal(layer.keys.float(), copied.keys.float())
        assert layer.key_buffer.data_ptr() != copied.key_buffer.data_ptr()
        if dtype is not None:
            assert torch.equal(layer.value_scale, copied.value_scale) and (layer.value_scale != 1).any()
    spoilt = COPIES[way](cache)
    if dtype is not None:  # the control: scales matter
        for layer in spoilt.layers:
            layer.value_scale.mul_(2)
    got, expected, off = (logits(model, first[:, -1:], each) for each in (other, cache, spoilt))
    assert torch.equal(got, expected)
    assert torch.equal(off, expected) == (dtype is None)


@torch.no_grad()
def logits(model, ids, cache):
    return model(ids, **named(cache)).logits


def test_a_cache_without_layers_is_copied():
    """What generate() makes for assisted decoding on older Transformers: layers come as they are needed."""
    cache = FlashCoreCache.like(DynamicCache())
    cache.update(*tokens(1, 3), 0)
    other = pickle.loads(pickle.dumps(cache))
    other.update(*tokens(1, 3), 1)
    assert type(other.layers[1]) is FlashCoreLayer and other.get_seq_length() == 3


@pytest.mark.parametrize("order", ["keys first", "values first"])
@pytest.mark.parametrize("kept", [[0, 1, 5, 8], list(range(4, 12)), list(range(12))], ids=len)
def test_assigned_tokens(kept, order):
    """As libraries that evict tokens do: the next ones follow what was assigned, as in a DynamicCache."""
    ours, other = layer_pair(None)
    for layer in (ours, other):
        for count in (9, 3):
            layer.update(*tokens(2, count, seed=count))
        keys, values = layer.keys[:, :, kept], layer.values[:, :, kept]
        if kept[-1] == 11:  # a slice is a view of the very slots that are written
            keys, values = layer.keys[:, :, kept[0] :], layer.values[:, :, kept[0] :]
        for name, states in (("keys", keys), ("values", values))[:: 1 if order == "keys first" else -1]:
            setattr(layer, name, states)
    assert_same(ours, other)
    address = ours.key_buffer.data_ptr()
    for count in (1, 4, 300):
        pair = tokens(2, count, seed=count)
        assert ours.get_mask_sizes(count) == (ours.length + count, 0)
        for got, want in zip(ours.update(*pair), other.update(*pair)):
            assert torch.equal(got, want)
        assert (ours.key_buffer.data_ptr() == address) == (count < 300)
    assert_same(ours, other)


def test_assigned_values_of_another_batch_and_alone():
    ours, other = layer_pair(None)
    for layer in (ours, other):
        layer.update(*tokens(2, 9))
        layer.keys = 2 * layer.keys  # as many: they need no partner
        layer.update(*tokens(2, 1, seed=1))
    assert_same(ours, other)
    keys, values = tokens(3, 5, seed=2)
    empty = FlashCoreLayer()
    for layer in (ours, other, empty):
        layer.keys, layer.values = keys, values
    assert_same(ours, other)
    assert torch.equal(empty.keys, keys) and empty.length == 5


def test_what_cannot_be_assigned():
    layer = FlashCoreLayer(max_length=10)
    layer.update(*tokens(2, 9))
    layer.keys = layer.keys[:, :, :4]
    assert layer.keys.shape[2] == 4 and layer.values.shape[2] == 9  # as a DynamicCache's
    with pytest.raises(ValueError, match="{'keys': 4} tokens were assigned .* that holds 9"):
        layer.update(*tokens(2, 1))
    layer.values = layer.values[:, :, :4]
    assert layer.length == 4
    with pytest.raises(ValueError, match="max_length=10"):
        layer.keys, layer.values = tokens(2, 11)
    assert layer.length == 4 and layer.keys.shape[2] == 11  # still waiting, and said so at the next token
    with pytest.raises(ValueError, match="tensor \\[B, Hkv, n, D\\]"):
        layer.keys = None


@pytest.mark.parametrize("seen", [4, 9])
def test_a_sliding_layer_takes_as_many_tokens_as_it_shows(seen):
    ours, other = layer_pair(6)
    for layer in (ours, other):
        layer.update(*tokens(2, seen))
        layer.keys, layer.values = -layer.keys, 3 * layer.values
    assert_same(ours, other)
    pair = tokens(2, 2, seed=1)
    for got, want in zip(ours.update(*pair), other.update(*pair)):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="sliding layer \\(window 6\\) that shows 5"):
        ours.keys = ours.keys[:, :, 1:]
    assert_same(ours, other)


def test_layers_of_different_lengths_are_not_recorded():
    """One graph has one length for all layers; an eviction may leave each its own."""
    from flashcore_hf.step import DECODER, Step, read_step

    _, model = model_pair("llama")
    model.eval()
    cache = FlashCoreCache(model.config)
    with torch.no_grad():
        model(prompts(1, 9)[0], **named(cache))
    call = {"input_ids": prompts(1, 1)[0], **named(cache)}
    (name,) = named(cache)
    assert isinstance(read_step(call, name, DECODER, "llama"), Step)
    layer = cache.layers[1]
    layer.keys, layer.values = layer.keys[:, :, :4], layer.values[:, :, :4]
    assert "different numbers of tokens" in read_step(call, name, DECODER, "llama")

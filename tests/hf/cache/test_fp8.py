"""FlashCoreCache in e4m3: what rounding costs, its scales, and who may read it."""

import pytest
import torch
import transformers
from flashcore_kernels import write_kv
from packaging.version import Version
from transformers import DynamicCache

from ..compare import greedy, named
from ..models import model_pair, prompts

if Version(transformers.__version__) < Version("4.57"):
    pytest.skip("FlashCoreCache needs 4.57", allow_module_level=True)

from flashcore_hf.cache.flashcore_cache import FlashCoreCache
from flashcore_hf.cache.layer import FlashCoreLayer
from flashcore_hf.cache.quantize import LARGEST, dequantize, head_scales, quantize

from .test_flashcore_cache import layer_pair, tokens


def test_fp8_error_is_that_of_three_bits():
    """Whatever the size of a head's values; and saturating where a later token is far larger."""
    sizes = torch.tensor([1e-3, 1.0, 300.0, 1e4])
    states = torch.randn(2, 4, 50, 32, generator=torch.Generator().manual_seed(0)) * sizes[:, None, None]
    scale = head_scales(states[:, :, :10])
    stored = dequantize(quantize(states, scale), scale, torch.float32)
    relative = (stored - states).abs() / states.abs().clamp(min=4e-3 * sizes[:, None, None])
    assert relative.max() <= 2**-4
    assert torch.equal(torch.log2(scale), torch.log2(scale).round())
    # A constant scale of 1 saturates the large head and loses the small one.
    plain = quantize(states, torch.ones_like(scale)).float()
    assert ((plain - states).abs() / states.abs())[:, 3].max() > 0.5
    huge = quantize(states * 1e4, scale).float()
    assert huge.abs().max() == LARGEST and not huge.isnan().any()
    assert quantize(torch.full((1, 1, 1, 1), torch.nan), torch.ones(1, 1)).float().isnan().all()


def test_fp8_does_not_depend_on_padding():
    """Scales are powers of two: a large value in a padding token changes what no other token is rounded to."""
    states = torch.randn(1, 2, 20, 16, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([30 * torch.ones(1, 2, 4, 16), states], dim=2)
    answers = []
    for given in (states, padded):
        scale = head_scales(given)
        answers.append(dequantize(quantize(given, scale), scale, torch.float32)[:, :, -20:])
    big = states.abs() > 2**-4
    assert torch.equal(answers[0][big], answers[1][big])
    assert not torch.equal(head_scales(states), head_scales(padded))


@pytest.mark.parametrize("window", [None, 6])
def test_fp8_layer(window):
    """Half a 16-bit cache's bytes; what comes back is within e4m3's rounding; scales are set once a sequence."""
    layer, other = layer_pair(window, dtype=torch.float8_e4m3fn)
    for step, count in enumerate((9, 1, 30, 150, 1)):
        pair = tokens(2, count, seed=step)
        got, want = layer.update(*pair), other.update(*pair)
        if step == 0:
            assert got[0] is pair[0]  # the first tokens are read as they came
            scales = layer.key_scale.clone()
            continue
        assert got[0].dtype == torch.float8_e4m3fn and torch.equal(got[0].flashcore_scale, scales)
        for part, wanted, scale in zip(got, want, (layer.key_scale, layer.value_scale)):
            error = (dequantize(part.stored, scale, torch.float32) - wanted).abs()
            assert (error <= wanted.abs() * 2**-4 + 1e-3).all()
    assert layer.key_buffer.element_size() == 1
    layer.reset()
    layer.update(*(100 * part for part in tokens(2, 9)))
    assert (layer.key_scale > 10 * scales).all()


def fp8_logits(model, ids, mask, cache) -> list[torch.Tensor]:
    """Logits of three chunks of a text, the later two of which read what the cache stored."""
    logits, start = [], 0
    with torch.no_grad():
        for count in (6, 4, 1):
            part = slice(start, start + count)
            start += count
            out = model(ids[:, part], attention_mask=mask[:, :start], **named(cache), use_cache=True)
            logits.append(out.logits[:, -1])
    return logits


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_fp8_model(model_type, paths):
    """Chunks and single tokens read e4m3 by kernel; logits near those of the exact cache, and generate() runs."""
    _, model = model_pair(model_type)
    ids, mask = prompts(2, 11, "left")
    exact = fp8_logits(model, ids, mask, DynamicCache(config=model.config))
    paths.clear()
    got = fp8_logits(model, ids, mask, FlashCoreCache(model.config, dtype=torch.float8_e4m3fn))
    assert paths["torch"] == 0
    torch.testing.assert_close(got[0], exact[0])  # nothing was read from the cache yet
    for a, b in zip(got[1:], exact[1:]):
        assert 0 < (a - b).abs().max() < 0.25 * b.abs().max()
    cache = FlashCoreCache(model.config, dtype=torch.float8_e4m3fn)
    assert greedy(model, ids, mask, 6, **named(cache)).shape == (2, 17)
    assert cache.layers[0].key_buffer.dtype == torch.float8_e4m3fn


def test_fp8_whose_scales_are_lost_is_refused():
    from flashcore_hf.attention import flashcore_attention

    layer = FlashCoreLayer(dtype=torch.float8_e4m3fn)
    layer.update(*tokens(1, 5, value_dim=8))
    keys, values = layer.update(*tokens(1, 1, value_dim=8))
    query = torch.randn(1, 2, 1, 8)
    module = torch.nn.Module()
    flashcore_attention(module, query, keys, values, None, is_causal=False)
    with pytest.raises(ValueError, match="have no scales"):
        flashcore_attention(module, query, keys.stored, values, None, is_causal=False)
    with pytest.raises(ValueError, match="reached clone, and only the attention function of flashcore"):
        keys.clone()
    assert keys.shape == (1, 2, 6, 8) and keys.dtype == torch.float8_e4m3fn and "StoredFp8" in repr(keys)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_fp8_under_another_implementation_is_refused(implementation):
    """With a sentence of ours, where PyTorch would speak of dtypes."""
    _, model = model_pair("llama", implementation=implementation)
    cache = FlashCoreCache(model.config, dtype=torch.float8_e4m3fn)
    ids, mask = prompts(2, 9)
    with pytest.raises(ValueError, match="FlashCoreCache .*set_attn_implementation\\('flashcore'\\)"):
        greedy(model, ids, mask, 3, **named(cache))
    greedy(model, ids, mask, 3, **named(FlashCoreCache(model.config)))  # in the model's dtype it is anybody's


@pytest.mark.parametrize("given", ["e4m3", "the model's dtype"])
def test_assigned_tokens_in_fp8(given):
    """Stored numbers stay what they are, with the scales that they have; those of another batch get scales anew."""
    layer = FlashCoreLayer(dtype=torch.float8_e4m3fn)
    layer.update(*(part * 30 for part in tokens(2, 9)))
    before, scale = layer.copied(), layer.key_scale.clone()
    kept = torch.tensor([0, 3, 8])
    if given == "e4m3":
        keys, values = (part.view(torch.uint8)[:, :, kept].view(part.dtype) for part in (layer.keys, layer.values))
    else:
        keys, values = (part[:, :, kept] for part in before)
    layer.keys, layer.values = keys, values
    assert layer.length == 3 and torch.equal(layer.key_scale, scale)
    for got, want in zip(layer.copied(), before):
        assert torch.equal(got, want[:, :, kept])
    layer.update(*tokens(2, 1))
    assert layer.keys.shape[2] == 4
    with pytest.raises(ValueError, match="no scales for as many sequences"):
        layer.keys, layer.values = layer.keys[:1], layer.values[:1]
    layer.keys, layer.values = (part / 1000 for part in tokens(3, 5))
    assert layer.key_scale.shape == (3, 2) and (layer.key_scale < scale.min()).all()
    assert (layer.copied()[0] - tokens(3, 5)[0] / 1000).abs().max() < 1e-3


def test_storing_and_quantize_agree_for_any_scale():
    """The cache's scales are powers of two, but write_kv takes others: the same bytes, where a reciprocal would not."""
    states = torch.randn(2, 3, 500, 16, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([[0.3, 0.01, 1.7], [0.09, 0.0033, 0.6]])
    held = [torch.zeros(2, 3, 500, 16).to(torch.float8_e4m3fn) for _ in range(2)]
    write_kv(*held, states, states, 0, scale, scale)
    assert torch.equal(held[0].float(), quantize(states, scale).float())
